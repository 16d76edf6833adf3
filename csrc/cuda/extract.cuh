// extract: steps 1 to 6, in three kernels: sizes first, then row pointers, then the entries. The
// size of the output depends on the data, so the caller has to wait for it between the second and
// the third.
#pragma once
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "sweep.cuh"
#include "team.cuh"

namespace svdk::cuda {

struct MeasureShared {
  RowShared row;
  Candidate unordered[kCapacity];
};

// Steps 1 to 5. The rows' constants are kept for the other kernels: n_inside is the number of
// entries, 0 for an invalid row.
template <typename T, int S>
SVDK_DEVICE void measure_row(const ExtractArgs& a, MeasureShared& s) {
  Cta cta(s.row, a.rows);
  Operands<T, S> row{};
  load_parameters(s.row, a.rows, cta.row);
  const bool refused = !s.row.parameters.valid || open_operands(a.rows, cta.row, row) != kBoth;
  if (!refused && !open_row(cta, a.rows, row, s.unordered)) return;
  if (!cta.leads() || threadIdx.x != 0) return;
  const bool invalid = refused || s.row.broadcast.next == kRefuse;
  const int64_t plane = a.rows.batch;
  if (invalid) {
    a.constants[cta.row].n_inside = 0;
    for (int k = 0; k < 3; ++k) a.stats[k * plane + cta.row] = static_cast<float>(kNaN);
    a.status[cta.row] = kInvalid;
    return;
  }
  Constants& c = s.row.broadcast.constants;
  c.inside_from = inside_from(c.max_w, c.log_alpha);
  a.constants[cta.row] = c;
  a.stats[cta.row] = static_cast<float>(S == kBase ? c.kl : kNaN);
  a.stats[plane + cta.row] = c.max_w;
  a.stats[2 * plane + cta.row] = static_cast<float>(c.max_w + c.log_zw);
  a.status[cta.row] = s.row.sums.exceptional.flags & kBaseMasked;
}

struct ScanShared {
  SlotsOf<8> slots;
};

// row_ptr from the counts, by one CTA.
SVDK_DEVICE void point_rows(const ExtractArgs& a, ScanShared& s) {
  int64_t start = 0;
  SVDK_ROLLED
  for (int from = 0; from < a.rows.batch; from += kThreads) {
    const int i = from + thread_id();
    const int64_t mine = i < a.rows.batch ? a.constants[i].n_inside : 0;
    int64_t all;
    const int64_t until = block_scan(s.slots, mine, all);
    if (i < a.rows.batch) a.row_ptr[i] = start + until - mine;
    start += all;
  }
  if (threadIdx.x == 0) a.row_ptr[a.rows.batch] = start;
}

// Step 6: the entries of a row, in order of id, by one CTA.
template <typename T, int S>
SVDK_DEVICE void fill_row(const ExtractArgs& a, ScanShared& s) {
  constexpr int N = Operands<T, S>::N;
  using Other = typename Operands<T, S>::Other;
  const int i = static_cast<int>(blockIdx.x);
  Constants c = a.constants[i];
  if (c.n_inside == 0) return;
  c.direction = a.rows.direction;
  Operands<T, S> row{};
  open_operands(a.rows, i, row);
  int64_t start = a.row_ptr[i];
  SVDK_ROLLED
  for (int from = 0; from < a.rows.vocab; from += kThreads * N) {
    const int at = from + thread_id() * N;
    float w[N], y[N];
    int hits = 0;
    if (at < a.rows.vocab) {
      Lanes<T, N> warm;
      warm.fetch(row.warm, at);
      warm.unpack(w);
      SVDK_UNROLL
      for (int e = 0; e < N; ++e) hits += at + e < a.rows.vocab && w[e] >= c.inside_from;
    }
    int64_t all;
    int64_t place = start + block_scan<int64_t>(s.slots, hits, all) - hits;
    start += all;
    if (hits == 0) continue;
    Lanes<Other, N> other;
    other.fetch(row.other, at);
    other.unpack(y);
    SVDK_UNROLL
    for (int e = 0; e < N; ++e) {
      if (!(at + e < a.rows.vocab && w[e] >= c.inside_from)) continue;
      a.ids[place] = at + e;
      a.p[place] = static_cast<float>(Math::exp(c.log_p_of(w[e])));
      a.delta[place] = static_cast<float>(c.delta_of(w[e], y[e]));
      ++place;
    }
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) extract_measure_kernel(ExtractArgs a) {
  SVDK_SHARED(MeasureShared, s);
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
