// From the flat arguments of an operation to those of its kernels. Host code without PyTorch,
// shared by the binding and by the tests that run the kernels on the CPU.
#pragma once
#include <cmath>
#include <type_traits>

#include "extract.cuh"
#include "logprob.cuh"

namespace svdk::cuda {

enum DType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// Everything a caller of any of the operations gives; unused fields are zero.
struct Call {
  int64_t dtype, source, batch, vocab, direction, mode, split, transport;
  const void* warm;
  int64_t warm_stride;
  const int64_t* warm_index;
  int64_t warm_limit;
  const void* other;
  int64_t other_stride;
  const int64_t* other_index;
  int64_t other_limit;
  double penalty;
  double strength;
  const float* strength_rows;
  double alpha;
  const float* alpha_rows;
  double temperature;
  const float* temperature_rows;
  double top_p;
  const float* top_p_rows;
  double min_p;
  const float* min_p_rows;
  int64_t top_k;
  const int64_t* top_k_rows;
  int64_t seed;
  const int64_t* seed_rows;
  int64_t offset;
  const int64_t* offset_rows;
  const int64_t* labels;
  const float* strengths;
  int64_t count;
  void* parts;
  uint32_t* tickets;
  int64_t* token;
  float* floats;
  int32_t* ints;
  float* curves;
  int64_t* greedy;
  float* stats;
  int32_t* status;
  void* extracted;
  int64_t* row_ptr;
  int64_t* ids;
  float *p, *delta;
};

inline RowArgs row_args(const Call& c) {
  return {{c.warm, c.warm_stride, c.warm_index, c.warm_limit},
          {c.other, c.other_stride, c.other_index, c.other_limit},
          static_cast<int>(c.batch),
          static_cast<int>(c.vocab),
          static_cast<int>(c.direction),
          static_cast<int>(c.split),
          static_cast<int>(c.transport),
          c.penalty,
          {c.alpha, c.alpha_rows},
          std::log(c.alpha),
          static_cast<Part*>(c.parts),
          c.tickets};
}

inline SampleArgs sample_args(const Call& c) {
  return {row_args(c),
          static_cast<int>(c.mode),
          {c.strength, c.strength_rows},
          {c.temperature, c.temperature_rows},
          {c.top_p, c.top_p_rows},
          {c.min_p, c.min_p_rows},
          {c.top_k, c.top_k_rows},
          {c.seed, c.seed_rows},
          {c.offset, c.offset_rows},
          c.labels,
          c.token,
          c.floats,
          c.ints};
}

inline ScoreArgs score_args(const Call& c) {
  return {row_args(c),
          c.labels,
          {c.strength, c.strength_rows},
          c.strengths,
          static_cast<int>(c.count),
          c.curves,
          c.greedy,
          c.stats,
          c.status};
}

inline ExtractArgs extract_args(const Call& c) {
  return {
      row_args(c), static_cast<Extracted*>(c.extracted), c.stats, c.status, c.row_ptr, c.ids, c.p,
      c.delta};
}

// CTAs a row: as many as keep `resident` CTAs on the device busy, within the slices there are.
inline int choose_split(int64_t batch, int64_t vocab, int64_t resident, int most) {
  const int64_t slices = (vocab + kSliceTokens - 1) / kSliceTokens;
  int split = 1;
  while (2 * split <= most && 2 * split <= slices && batch * split * 2 <= resident) split *= 2;
  return split;
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls f(Tag<element type>, integral constant of the source).
template <typename F>
void dispatch(const Call& c, const F& f) {
  auto by_source = [&](auto tag) {
    if (c.source == kNone) f(tag, std::integral_constant<int, kNone>());
    if (c.source == kBase) f(tag, std::integral_constant<int, kBase>());
    if (c.source == kVectorRow) f(tag, std::integral_constant<int, kVectorRow>());
  };
  if (c.dtype == kFloat) by_source(Tag<float>());
  if (c.dtype == kBFloat16) by_source(Tag<BFloat16>());
  if (c.dtype == kHalf) by_source(Tag<Half>());
}

}  // namespace svdk::cuda
