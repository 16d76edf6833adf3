// svdk._C_cuda: the CUDA ops, registered with the dispatcher through libtorch's stable ABI. Only
// checks, outputs, the workspace and launches here; the schemas are in svdk/ops/schema.py.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "arguments.cuh"
#include "extract.cuh"
#include "logits.cuh"
#include "logprob.cuh"
#include "sample.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace svdk;
using namespace svdk::cuda;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "svdk: ", what, ": ", cudaGetErrorString(error));
}

struct Device {
  int processors, major;
  ActiveRows active;  // sm_90 and newer
};

// A launch of CTAs in clusters of `split`; the attributes are the caller's to keep.
cudaLaunchConfig_t cluster_config(int64_t grid, int split, cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(split);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  // Two CTAs of a row on one processor would share what the row was split for.
  attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
  attributes[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// Clusters of 16 are not portable: a kernel must be told that it may have them.
constexpr int kPortableCluster = 8;
cudaError_t allow_large_clusters(const void* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Asked of one kernel: all are compiled to the same number of CTAs a processor (kMinBlocks), and
// clusters are held by groups of processors, of which a device may have fewer than its size says.
ActiveRows active_rows(int processors) {
  const auto kernel = reinterpret_cast<const void*>(steered_sample_kernel<BFloat16, kBase>);
  ActiveRows active{{static_cast<int64_t>(processors) * kMinBlocks}};
  const bool large = allow_large_clusters(kernel) == cudaSuccess;
  for (int k = 1; k < kClusterSizes; ++k) {
    const int split = 1 << k;
    if (split > kPortableCluster && !large) break;
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config = cluster_config(split, split, attributes);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) {
      active.of[k] = clusters;
    }
  }
  cudaGetLastError();  // a size that the device does not have is no error of ours
  return active;
}

Device device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) {
    Device d{};
    check(cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, index), "device");
    check(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index), "device");
    if (d.major >= 9) d.active = active_rows(d.processors);
    found = known.emplace(index, d).first;
  }
  return found->second;
}

// Below sm_90 the CTAs of a row meet in device memory. One workspace for each stream, and for each
// graph that a stream captures (its replays may run beside the stream's own work); every launch
// leaves it as it found it, so it is cleared only once. Kept until the process ends.
struct Workspace {
  void* parts = nullptr;
  uint32_t* tickets = nullptr;
};

Workspace workspace_of(int device, cudaStream_t stream, int64_t ctas) {
  static std::mutex mutex;
  static std::map<std::tuple<int, cudaStream_t, unsigned long long>, Workspace> known;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(stream, &status, &capture, nullptr, nullptr, nullptr, nullptr),
        "stream");
#else
  check(cudaStreamGetCaptureInfo(stream, &status, &capture), "stream");
#endif
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  Workspace& w = known[{device, stream, capture}];
  if (w.parts) return w;
  // Allocating is allowed during a capture only in this mode, and clearing only on another stream.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "workspace");
  Workspace fresh;
  cudaStream_t side = nullptr;
  cudaError_t error = cudaMalloc(&fresh.parts, ctas * sizeof(Part));
  if (!error) error = cudaMalloc(&fresh.tickets, ctas * sizeof(uint32_t));
  if (!error) error = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
  if (!error) error = cudaMemsetAsync(fresh.tickets, 0, ctas * sizeof(uint32_t), side);
  if (!error) error = cudaStreamSynchronize(side);
  if (side) cudaStreamDestroy(side);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error) {
    cudaFree(fresh.parts);
    cudaFree(fresh.tickets);
    check(error, "workspace");
  }
  return w = fresh;
}

// Where and how an operation runs.
struct Place {
  int device;
  cudaStream_t stream;
};

template <typename Args>
void launch(const char* name, void (*kernel)(Args), int64_t grid, int split, bool clusters,
            const Place& place, Args args) {
  if (grid == 0) return;
  STD_TORCH_CHECK(grid <= 0x7fffffff, "svdk::", name, ": too many rows");
  const auto address = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = cluster_config(grid, split, attributes);
  config.stream = place.stream;
  if (!clusters) config.numAttrs = 0;
  if (clusters && split > kPortableCluster) check(allow_large_clusters(address), name);
  void* arguments[] = {&args};
  check(cudaLaunchKernelExC(&config, address, arguments), name);
}

// How the rows of a call are split, and the workspace that this needs.
void plan(Call& c, const Place& place) {
  const Device device = device_of(place.device);
  if (device.major >= 9) {
    c.split = choose_cluster(c.batch, c.vocab, device.active);
    c.transport = c.split == 1 ? kSolo : kCluster;
    return;
  }
  const int64_t resident = static_cast<int64_t>(device.processors) * kMinBlocks;
  c.split = choose_split(c.batch, c.vocab, resident, kMaxSlices);
  c.transport = c.split == 1 ? kSolo : kWorkspace;
  if (c.split == 1) return;
  const Workspace w = workspace_of(place.device, place.stream, resident);
  c.parts = w.parts;
  c.tickets = w.tickets;
}

template <typename T>
const T* data(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <typename T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

void check_rows(const MaybeTensor& t, const char* name, ScalarType type, int64_t size,
                const Tensor& like) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cuda() && t->get_device() == like.get_device(), name,
                  " must be on the device of warm_logits");
  STD_TORCH_CHECK(t->scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size && t->is_contiguous(), name,
                  " must be a contiguous vector, one entry a row");
}

// The parameters of a call, checked.
struct Checked {
  const Tensor& like;
  int64_t batch;
  Real operator()(const char* name, double scalar, const MaybeTensor& rows) const {
    check_rows(rows, name, ScalarType::Float, batch, like);
    return {scalar, data<float>(rows)};
  }
  Integer operator()(const char* name, int64_t scalar, const MaybeTensor& rows) const {
    check_rows(rows, name, ScalarType::Long, batch, like);
    return {scalar, data<int64_t>(rows)};
  }
};

// The rows of a call, checked.
Call open_call(const Tensor& warm, const MaybeTensor& base, const MaybeTensor& vector,
               const MaybeTensor& warm_rows, const MaybeTensor& base_rows, int64_t vocab,
               int64_t direction) {
  Call c{};
  const ScalarType type = warm.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "warm_logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(warm.dim() == 2 && (warm.size(1) == 1 || warm.stride(1) == 1),
                  "warm_logits must be (B, V) with a contiguous last dimension");
  STD_TORCH_CHECK(vocab > 0 && vocab <= warm.size(1) && (!base || vocab <= base->size(1)),
                  "vocab_size out of range");
  c.dtype = static_cast<int64_t>(type == ScalarType::Float      ? DType::kFloat
                                 : type == ScalarType::BFloat16 ? DType::kBFloat16
                                                                : DType::kHalf);
  c.batch = warm_rows ? warm_rows->size(0) : warm.size(0);
  c.vocab = vocab;
  c.direction = direction;
  check_rows(warm_rows, "warm_rows", ScalarType::Long, c.batch, warm);
  check_rows(base_rows, "base_rows", ScalarType::Long, c.batch, warm);
  c.warm = {warm.const_data_ptr(), warm.stride(0), data<int64_t>(warm_rows), warm.size(0)};
  if (base) {
    STD_TORCH_CHECK(base->is_cuda() && base->get_device() == warm.get_device() &&
                        base->scalar_type() == type && base->dim() == 2 &&
                        (base->size(1) == 1 || base->stride(1) == 1),
                    "base_logits must be like warm_logits: device, dtype, (B, V), contiguous rows");
    STD_TORCH_CHECK(base_rows || base->size(0) == c.batch, "base_logits has the wrong batch");
    c.source = kBase;
    c.other = {base->const_data_ptr(), base->stride(0), data<int64_t>(base_rows), base->size(0)};
  } else if (vector) {
    STD_TORCH_CHECK(vector->is_cuda() && vector->get_device() == warm.get_device() &&
                        vector->scalar_type() == ScalarType::Float && vector->is_contiguous(),
                    "vector must be contiguous float32 on the device of warm_logits");
    const bool table = vector->dim() == 2;
    STD_TORCH_CHECK(vector->size(table ? 1 : 0) >= vocab && (!table || vector->size(0) == c.batch),
                    "vector must be (V,) or (B, V)");
    c.source = kVectorRow;
    c.other = {vector->const_data_ptr(), table ? vector->stride(0) : 0, nullptr, c.batch};
  }
  return c;
}

// Bias and mask of the logits of a call, checked.
Adjustments adjustments_of(const MaybeTensor& bias, const MaybeTensor& bitmask, const Call& c,
                           const Tensor& like) {
  Adjustments x{};
  if (bias) {
    const bool shared = bias->dim() == 1;
    STD_TORCH_CHECK(bias->is_cuda() && bias->get_device() == like.get_device() &&
                        bias->scalar_type() == ScalarType::Float && (shared || bias->dim() == 2) &&
                        bias->size(shared ? 0 : 1) >= c.vocab &&
                        (shared || bias->size(0) == c.batch),
                    "logit_bias must be float32, (V,) or (B, V), on the device of warm_logits");
    STD_TORCH_CHECK(c.vocab == 1 || bias->stride(shared ? 0 : 1) == 1,
                    "logit_bias must have a contiguous last dimension");
    x.bias = static_cast<const float*>(bias->const_data_ptr());
    x.bias_stride = shared ? 0 : bias->stride(0);
  }
  if (bitmask) {
    const int64_t words = (c.vocab + 31) / 32;
    STD_TORCH_CHECK(bitmask->is_cuda() && bitmask->get_device() == like.get_device() &&
                        bitmask->scalar_type() == ScalarType::Int && bitmask->dim() == 2 &&
                        bitmask->size(0) == c.batch && bitmask->size(1) >= words,
                    "bitmask must be int32, (B, ceil(V / 32)) or wider, on warm_logits' device");
    STD_TORCH_CHECK(words == 1 || bitmask->stride(1) == 1,
                    "bitmask must have a contiguous last dimension");
    x.bitmask = static_cast<const uint32_t*>(bitmask->const_data_ptr());
    x.bitmask_stride = bitmask->stride(0);
  }
  return x;
}

Place place_of(const Tensor& warm) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(static_cast<int32_t>(warm.get_device()), &stream));
  return {static_cast<int>(warm.get_device()), static_cast<cudaStream_t>(stream)};
}

Tensor allocate(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  try {
    return torch::stable::new_empty(like, {shape.begin(), shape.size()}, type);
  } catch (const std::exception&) {
    // The stable ABI says of any failure only that a call failed; of a sound shape it can only be
    // memory.
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    STD_TORCH_CHECK(false, "svdk: not enough memory on the device for an output of ", count,
                    " elements");
  }
}

std::tuple<Tensor, Tensor, Tensor> steered_sample(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, MaybeTensor logit_bias, MaybeTensor bitmask,
    MaybeTensor labels, int64_t mode, double strength, MaybeTensor strength_rows, double alpha,
    MaybeTensor alpha_rows, double penalty, double temperature, MaybeTensor temperature_rows,
    int64_t top_k, MaybeTensor top_k_rows, double top_p, MaybeTensor top_p_rows, double min_p,
    MaybeTensor min_p_rows, int64_t seed, MaybeTensor seed_rows, int64_t offset,
    MaybeTensor offset_rows, bool info) {
  Call c = open_call(warm, base, vector, warm_rows, base_rows, vocab, direction);
  c.adjustments = adjustments_of(logit_bias, bitmask, c, warm);
  STD_TORCH_CHECK(mode != kLabel || labels, "labels are needed for strength_mode 'label'");
  const Checked checked{warm, c.batch};
  c.parameters = {checked("labels", int64_t{0}, labels),
                  static_cast<int>(mode),
                  checked("strength", strength, strength_rows),
                  checked("alpha", alpha, alpha_rows),
                  penalty,
                  checked("temperature", temperature, temperature_rows),
                  checked("top_k", top_k, top_k_rows),
                  checked("top_p", top_p, top_p_rows),
                  checked("min_p", min_p, min_p_rows),
                  checked("seed", seed, seed_rows),
                  checked("offset", offset, offset_rows)};

  const torch::stable::accelerator::DeviceGuard guard(warm.get_device());
  const Place place = place_of(warm);
  Tensor token = allocate(warm, {c.batch}, ScalarType::Long);
  Tensor floats = info ? allocate(warm, {5, c.batch}, ScalarType::Float)
                       : allocate(warm, {0}, ScalarType::Float);
  Tensor ints =
      info ? allocate(warm, {2, c.batch}, ScalarType::Int) : allocate(warm, {0}, ScalarType::Int);
  c.token = out<int64_t>(token);
  if (info) {
    c.floats = out<float>(floats);
    c.ints = out<int32_t>(ints);
  }
  if (c.batch == 0) return {token, floats, ints};
  plan(c, place);
  dispatch_sample(c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    launch("steered_sample", steered_sample_kernel<T, decltype(source)::value>, c.batch * c.split,
           static_cast<int>(c.split), c.transport == kCluster, place, sample_args(c));
  });
  return {token, floats, ints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> steered_logprob(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, Tensor labels, double strength, MaybeTensor strength_rows,
    double alpha, MaybeTensor alpha_rows, double penalty, MaybeTensor strengths) {
  Call c = open_call(warm, base, vector, warm_rows, base_rows, vocab, direction);
  c.count = strengths ? strengths->size(0) : 1;
  const Checked checked{warm, c.batch};
  c.parameters.labels = checked("labels", int64_t{0}, labels);
  c.parameters.strength = checked("strength", strength, strength_rows);
  c.parameters.alpha = checked("alpha", alpha, alpha_rows);
  c.parameters.penalty = penalty;
  check_rows(strengths, "strengths", ScalarType::Float, c.count, warm);
  c.strengths = data<float>(strengths);

  const torch::stable::accelerator::DeviceGuard guard(warm.get_device());
  const Place place = place_of(warm);
  Tensor curves = allocate(warm, {3, c.batch, c.count}, ScalarType::Float);
  Tensor greedy = allocate(warm, {c.batch, c.count}, ScalarType::Long);
  Tensor stats = allocate(warm, {6, c.batch}, ScalarType::Float);
  Tensor status = allocate(warm, {c.batch}, ScalarType::Int);
  c.curves = out<float>(curves);
  c.greedy = out<int64_t>(greedy);
  c.stats = out<float>(stats);
  c.status = out<int32_t>(status);
  if (c.batch == 0) return {curves, greedy, stats, status};
  plan(c, place);
  dispatch(c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    launch("steered_logprob", steered_logprob_kernel<T, decltype(source)::value>, c.batch * c.split,
           static_cast<int>(c.split), c.transport == kCluster, place, logprob_args(c));
  });
  return {curves, greedy, stats, status};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> extract(
    Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows, MaybeTensor base_rows,
    int64_t vocab, int64_t direction, double alpha, MaybeTensor alpha_rows) {
  Call c = open_call(warm, base, vector, warm_rows, base_rows, vocab, direction);
  c.parameters.alpha = Checked{warm, c.batch}("alpha", alpha, alpha_rows);
  c.parameters.penalty = -kInf;
  STD_TORCH_CHECK(c.source != kNone, "extract needs base_logits or a vector");
  const torch::stable::accelerator::DeviceGuard guard(warm.get_device());
  const Place place = place_of(warm);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(place.stream, &capturing), "extract");
  STD_TORCH_CHECK(
      capturing == cudaStreamCaptureStatusNone,
      "extract cannot be captured in a graph: the size of its output depends on the data");
  Tensor row_ptr = allocate(warm, {c.batch + 1}, ScalarType::Long);
  Tensor stats = allocate(warm, {3, c.batch}, ScalarType::Float);
  Tensor status = allocate(warm, {c.batch}, ScalarType::Int);
  Tensor constants =
      allocate(warm, {c.batch * static_cast<int64_t>(sizeof(Constants))}, ScalarType::Byte);
  c.row_ptr = out<int64_t>(row_ptr);
  c.stats = out<float>(stats);
  c.status = out<int32_t>(status);
  c.constants = constants.mutable_data_ptr();
  if (c.batch > 0) plan(c, place);
  dispatch(c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    if constexpr (decltype(source)::value != kNone) {
      launch("extract", extract_measure_kernel<T, decltype(source)::value>, c.batch * c.split,
             static_cast<int>(c.split), c.transport == kCluster, place, extract_args(c));
    }
  });
  launch("extract", extract_point_kernel<>, 1, 1, false, place, extract_args(c));
  int64_t entries = 0;
  check(cudaMemcpyAsync(&entries, c.row_ptr + c.batch, sizeof entries, cudaMemcpyDeviceToHost,
                        place.stream),
        "extract");
  check(cudaStreamSynchronize(place.stream), "extract");
  Tensor ids = allocate(warm, {entries}, ScalarType::Long);
  Tensor p = allocate(warm, {entries}, ScalarType::Float);
  Tensor delta = allocate(warm, {entries}, ScalarType::Float);
  c.ids = out<int64_t>(ids);
  c.p = out<float>(p);
  c.delta = out<float>(delta);
  dispatch(c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    if constexpr (decltype(source)::value != kNone) {
      launch("extract", extract_fill_kernel<T, decltype(source)::value>, c.batch, 1, false, place,
             extract_args(c));
    }
  });
  return {row_ptr, ids, p, delta, stats, status};
}

Tensor steered_logits(Tensor warm, MaybeTensor base, MaybeTensor vector, MaybeTensor warm_rows,
                      MaybeTensor base_rows, int64_t vocab, int64_t direction,
                      int64_t strength_mode, double strength, MaybeTensor strength_rows,
                      double alpha, MaybeTensor alpha_rows, double penalty, MaybeTensor skip,
                      Tensor to) {
  Call c = open_call(warm, base, vector, warm_rows, base_rows, vocab, direction);
  const Checked checked{warm, c.batch};
  c.parameters.mode = static_cast<int>(strength_mode);
  c.parameters.strength = checked("strength", strength, strength_rows);
  c.parameters.alpha = checked("alpha", alpha, alpha_rows);
  c.parameters.penalty = penalty;
  c.parameters.temperature.scalar = c.parameters.top_p.scalar = 1;
  check_rows(skip, "skip", ScalarType::Bool, c.batch, warm);
  const ScalarType type = to.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == warm.scalar_type(),
                  "out must be float32 or have warm_logits' dtype");
  STD_TORCH_CHECK(to.is_cuda() && to.get_device() == warm.get_device() && to.dim() == 2 &&
                      to.size(0) == c.batch && to.size(1) >= vocab &&
                      (to.size(1) == 1 || to.stride(1) == 1),
                  "out must be (B, V) with a contiguous last dimension, on warm_logits' device");

  const torch::stable::accelerator::DeviceGuard guard(warm.get_device());
  const Place place = place_of(warm);
  Tensor status = allocate(warm, {c.batch}, ScalarType::Int);
  c.status = out<int32_t>(status);
  c.skip = data<bool>(skip);
  c.out = to.mutable_data_ptr();
  c.out_stride = to.stride(0);
  c.out_width = to.size(1);
  c.out_narrow = type != ScalarType::Float;
  if (c.batch == 0) return status;
  plan(c, place);
  dispatch(c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    launch("steered_logits", steered_logits_kernel<T, decltype(source)::value>, c.batch * c.split,
           static_cast<int>(c.split), c.transport == kCluster, place, logits_args(c));
  });
  return status;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(svdk, CUDA, m) {
  m.impl("steered_sample", TORCH_BOX(&steered_sample));
  m.impl("steered_logprob", TORCH_BOX(&steered_logprob));
  m.impl("extract", TORCH_BOX(&extract));
  m.impl("steered_logits", TORCH_BOX(&steered_logits));
}

// Importing the module is what registers the ops.
extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
