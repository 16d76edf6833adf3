// svdk._C: the CPU ops, registered with the dispatcher through libtorch's stable ABI. Only checks,
// pointers and outputs here; the schemas are in svdk/ops/schema.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "ops.h"
#include "pool.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Logits that a thread gets at least: fewer are swept in the time that waking another one takes.
constexpr int64_t kGrain = 1 << 16;

svdk::Runtime runtime(int64_t logits) {
  static const svdk::Sweeps* chosen = [] {
    const char* name = std::getenv("SVDK_CPU_ARCH");
    const svdk::Sweeps* s = name ? svdk::named_sweeps(name) : svdk::best_sweeps();
    STD_TORCH_CHECK(s, "SVDK_CPU_ARCH was '", name ? name : "",
                    "'; allowed here: those of avx512, avx2, portable that this processor runs");
    return s;
  }();
  svdk::Runtime r;
  const int64_t most = std::max<int64_t>(1, logits / kGrain);
  r.threads = static_cast<int>(std::min<int64_t>(torch::stable::get_num_threads(), most));
  r.sweeps = chosen;
  r.parallel = [threads = r.threads](int64_t count, const std::function<void(int64_t)>& task) {
    svdk::run_in_pool(count, threads, task);
  };
  return r;
}

svdk::Runtime runtime(const svdk::BatchLogits& rows) {
  return runtime(rows.batch * rows.vocab * (rows.base.data || rows.vector.data ? 2 : 1));
}

template <typename T>
const T* data(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// A parameter of every row: a scalar, or a tensor with one a row.
svdk::Real per_row(double scalar, const MaybeTensor& rows) { return {scalar, data<float>(rows)}; }
svdk::Integer per_row(int64_t scalar, const MaybeTensor& rows) {
  return {scalar, data<int64_t>(rows)};
}

std::vector<svdk::Parameters> every_row(const svdk::BatchParameters& parameters, int64_t batch) {
  std::vector<svdk::Parameters> rows;
  for (int64_t i = 0; i < batch; ++i) rows.push_back(parameters.at(i));
  return rows;
}

void check_index(const MaybeTensor& rows, int64_t limit, const char* name) {
  for (int64_t i = 0; rows && i < rows->size(0); ++i) {
    const int64_t row = data<int64_t>(rows)[i];
    STD_TORCH_CHECK(row >= 0 && row < limit, name, " was ", row, "; allowed: row indices below ",
                    limit);
  }
}

svdk::DType dtype_of(ScalarType type) {
  return type == ScalarType::Float      ? svdk::DType::kFloat
         : type == ScalarType::BFloat16 ? svdk::DType::kBFloat16
                                        : svdk::DType::kHalf;
}

// The rows of a call, from the arguments that every op begins with.
svdk::BatchLogits batch_logits(const Tensor& warm, const MaybeTensor& base,
                               const MaybeTensor& vector, const MaybeTensor& warm_rows,
                               const MaybeTensor& base_rows, int64_t vocab, int64_t direction) {
  const ScalarType type = warm.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "warm_logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(!base || base->scalar_type() == type, "base_logits must have warm_logits' dtype");
  STD_TORCH_CHECK(vocab > 0 && vocab <= warm.size(1) && (!base || vocab <= base->size(1)),
                  "vocab_size out of range");
  check_index(warm_rows, warm.size(0), "warm_rows");
  check_index(base_rows, base ? base->size(0) : 0, "base_rows");
  const int64_t bytes = type == ScalarType::Float ? 4 : 2;
  svdk::BatchLogits rows{};
  rows.warm = {warm.const_data_ptr(), warm.stride(0) * bytes, data<int64_t>(warm_rows)};
  if (base) {
    rows.base = {base->const_data_ptr(), base->stride(0) * bytes, data<int64_t>(base_rows)};
  }
  if (vector) {
    const int64_t stride = vector->dim() == 2 ? vector->stride(0) : 0;
    rows.vector = {vector->const_data_ptr(), stride * 4, nullptr};
  }
  rows.dtype = dtype_of(type);
  rows.vocab = static_cast<int>(vocab);
  rows.direction = static_cast<int>(direction);
  rows.batch = warm_rows ? warm_rows->size(0) : warm.size(0);
  return rows;
}

// Bias and mask of the logits of a call, of which each row has its own (or all share one bias).
void set_adjustments(svdk::BatchLogits& rows, const MaybeTensor& bias, const MaybeTensor& bitmask) {
  const int64_t words = (rows.vocab + 31) / 32;
  if (bias) {
    const bool shared = bias->dim() == 1;
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && (shared || bias->dim() == 2) &&
                        bias->size(shared ? 0 : 1) >= rows.vocab &&
                        (shared || bias->size(0) == rows.batch),
                    "logit_bias must be float32, (V,) or (B, V)");
    STD_TORCH_CHECK(rows.vocab == 1 || bias->stride(shared ? 0 : 1) == 1,
                    "logit_bias must have a contiguous last dimension");
    rows.bias = {bias->const_data_ptr(), shared ? 0 : bias->stride(0) * 4, nullptr};
  }
  if (bitmask) {
    STD_TORCH_CHECK(bitmask->scalar_type() == ScalarType::Int && bitmask->dim() == 2 &&
                        bitmask->size(0) == rows.batch && bitmask->size(1) >= words,
                    "bitmask must be int32, (B, ceil(V / 32)) or wider");
    STD_TORCH_CHECK(words == 1 || bitmask->stride(1) == 1,
                    "bitmask must have a contiguous last dimension");
    rows.allowed = {bitmask->const_data_ptr(), bitmask->stride(0) * 4, nullptr};
  }
}

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
    int64_t vocab, int64_t direction, MaybeTensor logit_bias, MaybeTensor bitmask,
    MaybeTensor labels, int64_t mode, double strength, MaybeTensor strength_rows, double alpha,
    MaybeTensor alpha_rows, double penalty, double temperature, MaybeTensor temperature_rows,
    int64_t top_k, MaybeTensor top_k_rows, double top_p, MaybeTensor top_p_rows, double min_p,
    MaybeTensor min_p_rows, int64_t seed, MaybeTensor seed_rows, int64_t offset,
    MaybeTensor offset_rows, bool info) {
  svdk::BatchLogits rows = batch_logits(warm, base, vector, warm_rows, base_rows, vocab, direction);
  set_adjustments(rows, logit_bias, bitmask);
  const int64_t batch = rows.batch;
  svdk::BatchParameters p{};
  p.labels = per_row(int64_t{0}, labels);
  p.mode = static_cast<int>(mode);
  p.strength = per_row(strength, strength_rows);
  p.alpha = per_row(alpha, alpha_rows);
  p.penalty = penalty;
  p.temperature = per_row(temperature, temperature_rows);
  p.top_k = per_row(top_k, top_k_rows);
  p.top_p = per_row(top_p, top_p_rows);
  p.min_p = per_row(min_p, min_p_rows);
  p.seed = per_row(seed, seed_rows);
  p.offset = per_row(offset, offset_rows);
  const std::vector<svdk::Parameters> parameters = every_row(p, batch);
  std::vector<svdk::SampleOutput> result(batch);
  svdk::steered_sample(runtime(rows), rows, parameters.data(), info, result.data());

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

// Of an op that draws nothing.
svdk::BatchParameters without_sampling(svdk::Real alpha, double penalty) {
  svdk::BatchParameters p{};
  p.mode = svdk::kConstant;
  p.alpha = alpha;
  p.penalty = penalty;
  p.temperature.scalar = p.top_p.scalar = 1;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> steered_logprob(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, Tensor labels, double strength, MaybeTensor strength_rows,
    double alpha, MaybeTensor alpha_rows, double penalty, MaybeTensor strengths) {
  const svdk::BatchLogits rows =
      batch_logits(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const int64_t batch = rows.batch, count = strengths ? strengths->size(0) : 1;
  svdk::BatchParameters p = without_sampling(per_row(alpha, alpha_rows), penalty);
  p.labels = per_row(int64_t{0}, labels);
  // The values of mu: one grid for all rows, or one value a row.
  std::vector<double> mu;
  if (strengths) {
    mu.assign(data<float>(strengths), data<float>(strengths) + count);
  } else {
    p.strength = per_row(strength, strength_rows);
  }
  const svdk::Strengths grid{mu.data(), static_cast<int>(count)};
  Tensor curves = allocate({3, batch, count}, ScalarType::Float);
  Tensor greedy = allocate({batch, count}, ScalarType::Long);
  float* curve = out<float>(curves);
  const int64_t plane = batch * count;
  const std::vector<svdk::Parameters> parameters = every_row(p, batch);
  std::vector<svdk::LogprobOutput> result(batch);
  svdk::steered_logprob(runtime(rows), rows, parameters.data(), strengths ? &grid : nullptr,
                        {curve, curve + plane, curve + 2 * plane, out<int64_t>(greedy)},
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
  const svdk::BatchLogits rows =
      batch_logits(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const int64_t batch = rows.batch;
  const std::vector<svdk::Parameters> parameters =
      every_row(without_sampling(per_row(alpha, alpha_rows), -svdk::kInf), batch);
  std::vector<svdk::Extracted> extracted(batch);
  std::vector<svdk::ExtractOutput> result(batch);
  const svdk::Runtime run = runtime(rows);
  svdk::extract_rows(run, rows, parameters.data(), extracted.data(), result.data());

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
    svdk::extract_entries(rows.at(i), extracted[i],
                          {to_ids + start[i], to_p + start[i], to_delta + start[i]});
  });
  return {row_ptr, ids, p, delta, stats, status};
}

Tensor steered_logits(Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows,
                      MaybeTensor base_rows, int64_t vocab, int64_t direction, int64_t mode,
                      double strength, MaybeTensor strength_rows, double alpha,
                      MaybeTensor alpha_rows, double penalty, MaybeTensor skip, Tensor to) {
  const svdk::BatchLogits rows =
      batch_logits(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const ScalarType type = to.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == warm.scalar_type(),
                  "out must be float32 or have warm_logits' dtype");
  STD_TORCH_CHECK(to.dim() == 2 && to.size(0) == rows.batch && to.size(1) >= vocab &&
                      (to.size(1) == 1 || to.stride(1) == 1),
                  "out must be (B, V) with a contiguous last dimension");
  svdk::BatchParameters p = without_sampling(per_row(alpha, alpha_rows), penalty);
  p.mode = static_cast<int>(mode);
  p.strength = per_row(strength, strength_rows);
  Tensor status = allocate({rows.batch}, ScalarType::Int);
  const int64_t bytes = type == ScalarType::Float ? 4 : 2;
  svdk::steered_logits(runtime(rows), rows, every_row(p, rows.batch).data(), data<bool>(skip),
                       {to.mutable_data_ptr(), to.stride(0) * bytes, dtype_of(type), rows.vocab,
                        static_cast<int>(to.size(1))},
                       out<int32_t>(status));
  return status;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(svdk, CPU, m) {
  m.impl("steered_sample", TORCH_BOX(&steered_sample));
  m.impl("steered_logprob", TORCH_BOX(&steered_logprob));
  m.impl("extract", TORCH_BOX(&extract));
  m.impl("steered_logits", TORCH_BOX(&steered_logits));
}

// Importing the module is what registers the ops; the one thing it says is which sweeps run here.
static PyObject* cpu_arch(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(runtime(0).sweeps->name);
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
