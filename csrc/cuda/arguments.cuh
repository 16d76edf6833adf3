// The arguments of the kernels, and how they follow from a call of an operation. Also host code
// without PyTorch, shared by the binding and by the tests that run the kernels on the CPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common.h"

// The tests build with shorter ones, so that short rows meet every path.
#ifndef SVDK_SLICE_TOKENS
#define SVDK_SLICE_TOKENS 8192
#endif

namespace svdk::cuda {

constexpr int kMaxSlices = 20;  // of 8,192 tokens: vocabularies up to 160k
constexpr int kSliceTokens = SVDK_SLICE_TOKENS;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The second operand of a kernel, a template parameter.
enum Source : int { kNone = 0, kBase = 1, kVectorRow = 2 };
// How the CTAs of a row exchange what they found.
enum Transport : int { kSolo = 0, kCluster = 1, kWorkspace = 2 };

// A logits tensor (or a table of vectors): rows picked by index, or in order.
struct Table {
  const void* data;
  int64_t stride;        // elements
  const int64_t* index;  // or null
  int64_t limit;         // rows
};

// What is done to the logits of a call as they are read; by the row of the call.
struct Adjustments {
  const float* bias;        // or null
  int64_t bias_stride;      // elements; 0: one for all rows
  const uint32_t* bitmask;  // or null
  int64_t bitmask_stride;   // words
};

struct Part;       // team.cuh
struct Constants;  // steering.cuh

// The rows of a call, their parameters, and how many CTAs share a row.
struct BatchArgs {
  Table warm, other;
  Adjustments adjustments;
  int batch, vocab, direction, split, transport;
  BatchParameters parameters;
  double log_alpha;   // of the scalar alpha
  Part* parts;        // kWorkspace: (batch, split)
  uint32_t* tickets;  // kWorkspace: (batch,), all zero between launches
};

struct SampleArgs {
  BatchArgs rows;
  int64_t* token;  // (B,)
  float* floats;   // (5, B) or null
  int32_t* ints;   // (2, B) or null
};

struct LogprobArgs {
  BatchArgs rows;
  const float* strengths;  // (M,) or null: one value a row
  int count;               // M
  float* curves;           // (3, B, M)
  int64_t* greedy;         // (B, M)
  float* stats;            // (6, B)
  int32_t* status;         // (B,)
};

struct ExtractArgs {
  BatchArgs rows;
  Constants* constants;  // (B,), from the first kernel to the others
  float* stats;          // (3, B)
  int32_t* status;       // (B,)
  int64_t* row_ptr;      // (B + 1,), second kernel
  int64_t* ids;          // (N,), third kernel
  float *p, *delta;      // (N,), third kernel
};

struct LogitsArgs {
  BatchArgs rows;
  const bool* skip;   // (B,) or null
  void* out;          // (B, width)
  int64_t stride;     // elements
  int width, narrow;  // narrow: out has the dtype of the warm logits, else float
  int32_t* status;    // (B,)
};

// Everything a caller of any of the operations gives; unused fields are zero.
struct Call {
  int64_t dtype, source, batch, vocab, direction, split, transport;
  Table warm, other;
  Adjustments adjustments;
  BatchParameters parameters;
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
  void* constants;
  int64_t* row_ptr;
  int64_t* ids;
  float *p, *delta;
  const bool* skip;
  void* out;
  int64_t out_stride, out_width, out_narrow;
};

inline BatchArgs batch_args(const Call& c) {
  return {c.warm,
          c.other,
          c.adjustments,
          static_cast<int>(c.batch),
          static_cast<int>(c.vocab),
          static_cast<int>(c.direction),
          static_cast<int>(c.split),
          static_cast<int>(c.transport),
          c.parameters,
          std::log(c.parameters.alpha.scalar),
          static_cast<Part*>(c.parts),
          c.tickets};
}
inline SampleArgs sample_args(const Call& c) { return {batch_args(c), c.token, c.floats, c.ints}; }
inline LogprobArgs logprob_args(const Call& c) {
  BatchArgs rows = batch_args(c);
  rows.parameters.mode = kLabel;  // every row has one
  if (c.strengths) rows.parameters.strength = {0, nullptr};
  return {rows, c.strengths, static_cast<int>(c.count), c.curves, c.greedy, c.stats, c.status};
}
inline ExtractArgs extract_args(const Call& c) {
  return {
      batch_args(c), static_cast<Constants*>(c.constants), c.stats, c.status, c.row_ptr, c.ids, c.p,
      c.delta};
}
inline LogitsArgs logits_args(const Call& c) {
  return {batch_args(c),
          c.skip,
          c.out,
          c.out_stride,
          static_cast<int>(c.out_width),
          static_cast<int>(c.out_narrow),
          c.status};
}

// CTAs a row: as many as keep `resident` CTAs on the device busy, within the slices there are.
inline int choose_split(int64_t batch, int64_t vocab, int64_t resident, int most) {
  const int64_t slices = (vocab + kSliceTokens - 1) / kSliceTokens;
  int split = 1;
  while (2 * split <= most && 2 * split <= slices && batch * split * 2 <= resident) split *= 2;
  return split;
}

// Sizes of clusters, 1 (none) to 16, and how many rows a device can have under way at once with so
// many CTAs each; 0 where it cannot hold such clusters.
constexpr int kClusterSizes = 5;
struct ActiveRows {
  int64_t of[kClusterSizes];
};

// What a wave takes beside its slices (beginning, merging, finishing), in slices: an estimate.
constexpr int64_t kWaveOverhead = 1;

// CTAs a row where they form clusters: the fewest for which the waves of rows, each as long as the
// slices of a CTA, are soonest over. One row more than a wave takes would otherwise cost a second.
inline int choose_cluster(int64_t batch, int64_t vocab, const ActiveRows& active) {
  const int64_t cut = (vocab + kSliceTokens - 1) / kSliceTokens;
  const int64_t slices = cut < kMaxSlices ? cut : kMaxSlices;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int k = 0; k < kClusterSizes; ++k) {
    const int64_t split = int64_t{1} << k;
    if (split > slices || active.of[k] == 0) continue;
    const int64_t waves = (batch + active.of[k] - 1) / active.of[k];
    const int64_t cost = waves * ((slices + split - 1) / split + kWaveOverhead);
    if (cost < least) {
      least = cost;
      best = static_cast<int>(split);
    }
  }
  return best;
}

// Logits of type T, read with the adjustments of the call. A type, so that kernels without them are
// compiled as if there were none.
template <typename T>
struct Adjusted {
  T value;
};

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
  const DType dtype = static_cast<DType>(c.dtype);
  if (dtype == DType::kFloat) by_source(Tag<float>());
  if (dtype == DType::kBFloat16) by_source(Tag<BFloat16>());
  if (dtype == DType::kHalf) by_source(Tag<Half>());
}

// Likewise for steered_sample: with Adjusted types where the call adjusts its logits.
template <typename F>
void dispatch_sample(const Call& c, const F& f) {
  const bool adjusts = c.adjustments.bias || c.adjustments.bitmask;
  dispatch(c, [&](auto tag, auto source) {
    using T = typename decltype(tag)::type;
    if (adjusts) {
      f(Tag<Adjusted<T>>(), source);
    } else {
      f(tag, source);
    }
  });
}

}  // namespace svdk::cuda
