// C entry points to the kernels, for ctypes (tests/helpers/cuda_shim.py).
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/arguments.cuh"
#include "../../csrc/cuda/extract.cuh"
#include "../../csrc/cuda/logits.cuh"
#include "../../csrc/cuda/logprob.cuh"
#include "../../csrc/cuda/sample.cuh"
#include "fibers.h"

using namespace svdk;
using namespace svdk::cuda;

namespace {

std::string message;
std::vector<std::pair<const char*, const char*>> readable;

// Row by row: what lies between two rows must not be read either.
void allow(const Table& t, int64_t width, int64_t bytes) {
  const char* begin = static_cast<const char*>(t.data);
  for (int64_t i = 0; t.data && i < t.limit; ++i, begin += t.stride * bytes) {
    readable.push_back({begin, begin + width * bytes});
  }
}

void prepare(const Call& c) {
  readable.clear();
  const int64_t bytes = static_cast<DType>(c.dtype) == DType::kFloat ? 4 : 2;
  allow(c.warm, c.vocab, bytes);
  allow(c.other, c.vocab, c.source == kVectorRow ? 4 : bytes);
  allow({c.adjustments.bias, c.adjustments.bias_stride, nullptr, c.batch}, c.vocab, 4);
}

template <typename F>
const char* run(const Call& c, int64_t grid, int64_t together, uint64_t schedule, const F& kernel) {
  prepare(c);
  if (grid == 0) return nullptr;
  message =
      shim::launch(static_cast<int>(grid), kThreads, static_cast<int>(together), schedule, kernel);
  for (int64_t i = 0; message.empty() && c.tickets && i < c.batch; ++i) {
    if (c.tickets[i] != 0) message = "the workspace was not left as it was found";
  }
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace

namespace svdk::cuda {
namespace {
template <typename T>
T load(const void* p) {
  const char* at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) shim::fail("a load that is not aligned");
  bool inside = false;
  for (const auto& [begin, end] : readable) inside |= at >= begin && at + sizeof(T) <= end;
  if (!inside) shim::fail("a load outside of the tensors");
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
}  // namespace

uint4 load16(const void* p) { return load<uint4>(p); }
float load_in_turn(const float* p) { return load<float>(p); }
}  // namespace svdk::cuda

extern "C" {

int64_t shim_sizes(int which) {
  const int64_t sizes[] = {sizeof(Call), sizeof(Part), sizeof(Constants), kCapacity, kSliceTokens};
  return sizes[which];
}

int shim_choose_cluster(int64_t batch, int64_t vocab, const ActiveRows* active) {
  return choose_cluster(batch, vocab, *active);
}

const char* shim_sample(const Call* c, uint64_t schedule) {
  const SampleArgs a = sample_args(*c);
  const char* error = nullptr;
  dispatch_sample(*c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    constexpr int S = decltype(source)::value;
    error =
        run(*c, c->batch * c->split, c->split, schedule, [&] { steered_sample_kernel<T, S>(a); });
  });
  return error;
}

#ifndef SHIM_SAMPLE_ONLY
const char* shim_logprob(const Call* c, uint64_t schedule) {
  const LogprobArgs a = logprob_args(*c);
  const char* error = nullptr;
  dispatch(*c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    constexpr int S = decltype(source)::value;
    error =
        run(*c, c->batch * c->split, c->split, schedule, [&] { steered_logprob_kernel<T, S>(a); });
  });
  return error;
}

const char* shim_logits(const Call* c, uint64_t schedule) {
  const LogitsArgs a = logits_args(*c);
  const char* error = nullptr;
  dispatch(*c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    constexpr int S = decltype(source)::value;
    error =
        run(*c, c->batch * c->split, c->split, schedule, [&] { steered_logits_kernel<T, S>(a); });
  });
  return error;
}

// Sizes and row pointers, or with `fill` the entries.
const char* shim_extract(const Call* c, uint64_t schedule, int fill) {
  const ExtractArgs a = extract_args(*c);
  const char* error = nullptr;
  dispatch(*c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    constexpr int S = decltype(source)::value;
    if constexpr (S != kNone) {
      if (fill) {
        error = run(*c, c->batch, 1, schedule, [&] { extract_fill_kernel<T, S>(a); });
        return;
      }
      error = run(*c, c->batch * c->split, c->split, schedule,
                  [&] { extract_measure_kernel<T, S>(a); });
      if (!error) error = run(*c, 1, 1, schedule, [&] { extract_point_kernel<>(a); });
    }
  });
  return error;
}
#endif
}
