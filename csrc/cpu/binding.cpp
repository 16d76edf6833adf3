// svdk._C: the CPU ops, registered with the dispatcher through libtorch's stable ABI. Only checks,
// pointers and outputs here; the schemas are in svdk/ops/schema.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

svdk::Runtime runtime() {
  static const svdk::Sweeps* chosen = [] {
    const char* name = std::getenv("SVDK_CPU_ARCH");
    const svdk::Sweeps* s = name ? svdk::named_sweeps(name) : svdk::best_sweeps();
    STD_TORCH_CHECK(s, "SVDK_CPU_ARCH was '", name ? name : "",
                    "'; allowed here: those of avx512, avx2, portable that this processor runs");
    return s;
  }();
  svdk::Runtime r;
  r.threads = static_cast<int>(torch::stable::get_num_threads());
  r.sweeps = chosen;
  r.parallel = [](int64_t count, const std::function<void(int64_t)>& task) {
    if (count == 1) return task(0);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i);
    });
  };
  return r;
}

template <typename T>
const T* data(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// A per-row parameter: a value a row, or one for all.
template <typename T>
T pick(T scalar, const T* rows, int64_t i) {
  return rows ? rows[i] : scalar;
}

// The row arguments of every op.
class Rows {
 public:
  Rows(const Tensor& warm, const MaybeTensor& base, const MaybeTensor& vector,
       const MaybeTensor& warm_rows, const MaybeTensor& base_rows, int64_t vocab, int64_t direction)
      : warm_(static_cast<const char*>(warm.const_data_ptr())),
        base_(base ? static_cast<const char*>(base->const_data_ptr()) : nullptr),
        vector_(data<float>(vector)),
        warm_rows_(data<int64_t>(warm_rows)),
        base_rows_(data<int64_t>(base_rows)),
        warm_limit_(warm.size(0)),
        base_limit_(base ? base->size(0) : 0),
        vocab_(static_cast<int>(vocab)),
        direction_(static_cast<int>(direction)) {
    batch = warm_rows ? warm_rows->size(0) : warm.size(0);
    const ScalarType type = warm.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
        "warm_logits must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(!base || base->scalar_type() == type,
                    "base_logits must have warm_logits' dtype");
    STD_TORCH_CHECK(vocab > 0 && vocab <= warm.size(1) && (!base || vocab <= base->size(1)),
                    "vocab_size out of range");
    type_ = type == ScalarType::Float      ? svdk::DType::kFloat
            : type == ScalarType::BFloat16 ? svdk::DType::kBFloat16
                                           : svdk::DType::kHalf;
    const int64_t bytes = type == ScalarType::Float ? 4 : 2;
    warm_stride_ = warm.stride(0) * bytes;
    base_stride_ = base ? base->stride(0) * bytes : 0;
    vector_stride_ = vector && vector->dim() == 2 ? vector->stride(0) : 0;
    check(warm_rows_, warm_limit_, "warm_rows");
    check(base_rows_, base_limit_, "base_rows");
  }

  svdk::Row operator()(int64_t i) const {
    const int64_t w = warm_rows_ ? warm_rows_[i] : i, b = base_rows_ ? base_rows_[i] : i;
    return {warm_ + w * warm_stride_,
            base_ ? base_ + b * base_stride_ : nullptr,
            vector_ ? vector_ + i * vector_stride_ : nullptr,
            type_,
            vocab_,
            direction_};
  }

  int64_t batch;

 private:
  void check(const int64_t* rows, int64_t limit, const char* name) const {
    for (int64_t i = 0; rows && i < batch; ++i) {
      STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < limit, name, " was ", rows[i],
                      "; allowed: row indices below ", limit);
    }
  }
  const char *warm_, *base_;
  const float* vector_;
  const int64_t *warm_rows_, *base_rows_;
  int64_t warm_limit_, base_limit_, warm_stride_, base_stride_, vector_stride_;
  int vocab_, direction_;
  svdk::DType type_;
};

Tensor allocate(std::initializer_list<int64_t> shape, ScalarType type) {
  try {
    return torch::stable::empty({shape.begin(), shape.size()}, type);
  } catch (const std::exception&) {
    // The stable ABI says of any failure only that a call failed; of a sound shape it can only be
    // memory.
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    STD_TORCH_CHECK(false, "svdk: not enough memory for an output of ", count, " elements");
  }
}

template <typename T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> steered_sample(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, MaybeTensor labels, int64_t mode, double strength,
    MaybeTensor strength_rows, double alpha, MaybeTensor alpha_rows, double penalty,
    double temperature, MaybeTensor temperature_rows, int64_t top_k, MaybeTensor top_k_rows,
    double top_p, MaybeTensor top_p_rows, double min_p, MaybeTensor min_p_rows, int64_t seed,
    MaybeTensor seed_rows, int64_t offset, MaybeTensor offset_rows, bool info) {
  const Rows rows(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const int64_t batch = rows.batch;
  auto parameters = [&](int64_t i) {
    svdk::Parameters p;
    p.mode = static_cast<int>(mode);
    p.penalty = penalty;
    p.strength = strength_rows ? data<float>(strength_rows)[i] : strength;
    p.alpha = alpha_rows ? data<float>(alpha_rows)[i] : alpha;
    p.temperature = temperature_rows ? data<float>(temperature_rows)[i] : temperature;
    p.top_p = top_p_rows ? data<float>(top_p_rows)[i] : top_p;
    p.min_p = min_p_rows ? data<float>(min_p_rows)[i] : min_p;
    p.top_k = pick(top_k, data<int64_t>(top_k_rows), i);
    p.label = pick(int64_t{0}, data<int64_t>(labels), i);
    p.seed = static_cast<uint64_t>(pick(seed, data<int64_t>(seed_rows), i));
    p.offset = static_cast<uint64_t>(pick(offset, data<int64_t>(offset_rows), i));
    return p;
  };
  std::vector<svdk::SampleOutput> result(batch);
  svdk::steered_sample(runtime(), batch, rows, parameters, info, result.data());

  Tensor token = allocate({batch}, ScalarType::Long);
  for (int64_t i = 0; i < batch; ++i) out<int64_t>(token)[i] = result[i].token;
  if (!info) return {token, allocate({0}, ScalarType::Float), allocate({0}, ScalarType::Int)};
  Tensor floats = allocate({5, batch}, ScalarType::Float),
         ints = allocate({2, batch}, ScalarType::Int);
  for (int64_t i = 0; i < batch; ++i) {
    const svdk::SampleOutput& r = result[i];
    const float row[5] = {r.strength, r.kl, r.logprob_steered, r.logprob_warm, r.logprob_base};
    for (int k = 0; k < 5; ++k) out<float>(floats)[k * batch + i] = row[k];
    out<int32_t>(ints)[i] = r.candidates;
    out<int32_t>(ints)[batch + i] = r.status;
  }
  return {token, floats, ints};
}

svdk::Parameters scoring(double penalty, double alpha, int64_t label) {
  svdk::Parameters p{};
  p.mode = svdk::kConstant;
  p.alpha = alpha;
  p.penalty = penalty;
  p.temperature = p.top_p = 1;
  p.label = label;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> steered_logprob(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, Tensor labels, double strength, MaybeTensor strength_rows,
    double alpha, MaybeTensor alpha_rows, double penalty, MaybeTensor strengths) {
  const Rows rows(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const int64_t batch = rows.batch, count = strengths ? strengths->size(0) : 1;
  const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
  auto parameters = [&](int64_t i) {
    return scoring(penalty, alpha_rows ? data<float>(alpha_rows)[i] : alpha, label[i]);
  };
  // The values of mu: one grid for all rows, or one value a row.
  std::vector<double> grid;
  if (strengths) {
    grid.assign(data<float>(strengths), data<float>(strengths) + count);
  } else {
    for (int64_t i = 0; i < batch; ++i)
      grid.push_back(strength_rows ? data<float>(strength_rows)[i] : strength);
  }
  Tensor curves = allocate({3, batch, count}, ScalarType::Float);
  Tensor greedy = allocate({batch, count}, ScalarType::Long);
  float* curve = out<float>(curves);
  int64_t* token = out<int64_t>(greedy);
  std::vector<svdk::LogprobOutput> result(batch);
  svdk::steered_logprob(
      runtime(), batch, rows, parameters, static_cast<int>(count),
      [&](int64_t i) { return grid.data() + (strengths ? 0 : i); },
      [&](int64_t i) {
        const int64_t at = i * count, plane = batch * count;
        return svdk::LogprobCurves{curve + at, curve + plane + at, curve + 2 * plane + at,
                                   token + at};
      },
      result.data());
  Tensor stats = allocate({6, batch}, ScalarType::Float),
         status = allocate({batch}, ScalarType::Int);
  for (int64_t i = 0; i < batch; ++i) {
    const svdk::LogprobOutput& r = result[i];
    const float row[6] = {r.gain, r.norm2, r.variance, r.kl, r.logprob_warm, r.logprob_base};
    for (int k = 0; k < 6; ++k) out<float>(stats)[k * batch + i] = row[k];
    out<int32_t>(status)[i] = r.status;
  }
  return {curves, greedy, stats, status};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> extract(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, double alpha, MaybeTensor alpha_rows) {
  const Rows rows(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const int64_t batch = rows.batch;
  auto parameters = [&](int64_t i) {
    return scoring(-svdk::kInf, alpha_rows ? data<float>(alpha_rows)[i] : alpha, 0);
  };
  std::vector<svdk::ExtractRow> extracted(batch);
  std::vector<svdk::ExtractOutput> result(batch);
  const svdk::Runtime run = runtime();
  svdk::extract_rows(run, batch, rows, parameters, extracted.data(), result.data());

  Tensor row_ptr = allocate({batch + 1}, ScalarType::Long),
         stats = allocate({3, batch}, ScalarType::Float);
  Tensor status = allocate({batch}, ScalarType::Int);
  int64_t* start = out<int64_t>(row_ptr);
  start[0] = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const svdk::ExtractOutput& r = result[i];
    start[i + 1] = start[i] + r.count;
    out<float>(stats)[i] = r.kl;
    out<float>(stats)[batch + i] = r.max_logit;
    out<float>(stats)[2 * batch + i] = r.lse;
    out<int32_t>(status)[i] = r.status;
  }
  Tensor ids = allocate({start[batch]}, ScalarType::Long);
  Tensor p = allocate({start[batch]}, ScalarType::Float),
         delta = allocate({start[batch]}, ScalarType::Float);
  int64_t* to_ids = out<int64_t>(ids);
  float *to_p = out<float>(p), *to_delta = out<float>(delta);
  run.parallel(batch, [&](int64_t i) {
    if (result[i].count == 0) return;
    svdk::extract_entries(rows(i), extracted[i], to_ids + start[i], to_p + start[i],
                          to_delta + start[i]);
  });
  return {row_ptr, ids, p, delta, stats, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(svdk, CPU, m) {
  m.impl("steered_sample", TORCH_BOX(&steered_sample));
  m.impl("steered_logprob", TORCH_BOX(&steered_logprob));
  m.impl("extract", TORCH_BOX(&extract));
}

// Importing the module is what registers the ops; the one thing it says is which sweeps run here.
static PyObject* cpu_arch(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(runtime().sweeps->name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"cpu_arch", cpu_arch, METH_NOARGS, "Instruction set that the CPU sweeps use here."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
