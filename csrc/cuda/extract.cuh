// extract: sizes first, then row pointers, then the entries. The size of the output depends on the
// data, so the caller has to wait for it between the second and the third kernel.
#pragma once
#include "sample.cuh"

namespace svdk::cuda {

template <typename T, int S>
SVDK_DEVICE void measure_row(const ExtractArgs& a, Shared& s) {
  Cta cta(s, a.rows);
  Pair<T, S> row{};
  const bool refused = !alpha_is_valid(a.rows, cta.row) || open_pair(a.rows, cta.row, row);
  if (!refused && !open_row(cta, a.rows, row, log_alpha_of(a.rows, cta.row))) return;
  if (!cta.leads() || threadIdx.x != 0) return;
  const bool invalid = refused || s.verdict.next == kFinished;
  const int64_t plane = a.rows.batch;
  if (invalid) {
    a.extracted[cta.row].count = 0;
    for (int k = 0; k < 3; ++k) a.stats[k * plane + cta.row] = SVDK_NAN;
    a.status[cta.row] = kInvalid;
    return;
  }
  const Context& c = s.verdict.context;
  a.extracted[cta.row] = {
      c.log_w, c.log_b, c.kl, c.max_w, c.max_b, inside_from(c.max_w, c.log_alpha), c.inside};
  a.stats[cta.row] = S == kBase ? static_cast<float>(c.kl) : SVDK_NAN;
  a.stats[plane + cta.row] = c.max_w;
  a.stats[2 * plane + cta.row] = static_cast<float>(c.max_w + c.log_w);
  a.status[cta.row] = s.sums.flags & kBaseMasked;
}

// Exclusive prefix sum over the block; `all` is the sum.
SVDK_DEVICE int64_t block_scan(unsigned long long* slots, int64_t mine, int64_t& all) {
  int64_t until = mine;
  for (int o = 1; o < 32; o <<= 1) {
    const int64_t x = __shfl_up_sync(0xffffffffu, until, o);
    if (lane_id() >= o) until += x;
  }
  if (lane_id() == 31) slots[warp_id()] = static_cast<unsigned long long>(until);
  __syncthreads();
  all = 0;
  int64_t before = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp_id()) before = all;
    all += static_cast<int64_t>(slots[i]);
  }
  __syncthreads();
  return before + until - mine;
}

struct ScanShared {
  unsigned long long slots[kWarps];
};

// row_ptr from the counts, by one CTA.
SVDK_DEVICE void point_rows(const ExtractArgs& a, ScanShared& s) {
  int64_t start = 0;
  SVDK_ROLLED
  for (int from = 0; from < a.rows.batch; from += kThreads) {
    const int i = from + static_cast<int>(threadIdx.x);
    const int64_t mine = i < a.rows.batch ? a.extracted[i].count : 0;
    int64_t all;
    const int64_t before = block_scan(s.slots, mine, all);
    if (i < a.rows.batch) a.row_ptr[i] = start + before;
    start += all;
  }
  if (threadIdx.x == 0) a.row_ptr[a.rows.batch] = start;
}

// The entries of a row, in order of id, by one CTA.
template <typename T, int S>
SVDK_DEVICE void fill_row(const ExtractArgs& a, ScanShared& s) {
  constexpr int N = Pair<T, S>::N;
  using Other = typename Pair<T, S>::Other;
  const int i = static_cast<int>(blockIdx.x);
  const Extracted x = a.extracted[i];
  if (x.count == 0) return;
  Pair<T, S> row{};
  open_pair(a.rows, i, row);
  Context c{};
  c.direction = a.rows.direction;
  c.max_w = x.max_w;
  c.max_b = x.max_b;
  c.log_w = x.log_w;
  c.log_b = x.log_b;
  c.kl = x.kl;
  int64_t start = a.row_ptr[i];
  SVDK_ROLLED
  for (int from = 0; from < a.rows.vocab; from += kThreads * N) {
    const int at = from + static_cast<int>(threadIdx.x) * N;
    float w[N], y[N];
    int hits = 0;
    if (at < a.rows.vocab) {
      Lanes<T, N> warm;
      warm.fetch(row.warm, at);
      warm.unpack(w);
      SVDK_UNROLL
      for (int e = 0; e < N; ++e) hits += at + e < a.rows.vocab && w[e] >= x.inside_from;
    }
    int64_t all;
    int64_t place = start + block_scan(s.slots, hits, all);
    start += all;
    if (hits == 0) continue;
    Lanes<Other, N> other;
    other.fetch(row.other, at);
    other.unpack(y);
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      if (!(at + e < a.rows.vocab && w[e] >= x.inside_from)) continue;
      a.ids[place] = at + e;
      a.p[place] = fast_exp(static_cast<float>(log_p_of(c, w[e])));
      a.delta[place] = static_cast<float>(delta_of(c, w[e], y[e]));
      ++place;
    }
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) extract_measure_kernel(ExtractArgs a) {
  SVDK_SHARED(Shared, s);
  measure_row<T, S>(a, s);
}

template <int = 0>
__global__ void __launch_bounds__(kThreads) extract_point_kernel(ExtractArgs a) {
  SVDK_SHARED(ScanShared, s);
  point_rows(a, s);
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads) extract_fill_kernel(ExtractArgs a) {
  SVDK_SHARED(ScanShared, s);
  fill_row<T, S>(a, s);
}

}  // namespace svdk::cuda
