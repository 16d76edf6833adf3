// Histograms of the steered logits of a row, by all CTAs of it: what step 10 finds its thresholds
// with, instead of a sort. Masses are summed in 64-bit fixed point: integer sums do not depend on
// the order of the atomics.
#pragma once
#include "../common.h"
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "team.cuh"

namespace svdk::cuda {

constexpr float kMassUnit = 0x1p40f;
constexpr float kBinsPerNat = 64.0f;

// Where a threshold on the steered logits lies among bins or keys, counted from the best.
struct Cut {
  uint32_t bin;
  unsigned long long count_before, count, mass_before, mass;
};

// Which bin a token falls into: by its distance from the largest steered logit, or by 11 bits of a
// 32-bit key whose higher bits are known. Keys ascend from the best steered logit down, or are ids.
enum SearchKind : int { kLinear = 0, kByCount = 1, kByMass = 2, kTies = 3 };
struct Binning {
  int kind, shift, width;
  uint32_t prefix;
  float top, per_unit, floor;  // only tokens from `floor` up; for kTies: at it
};

struct Histogram {
  uint32_t count[kBins];
  unsigned long long mass[kBins];  // in units of kMassUnit
};

// Bins of the first histogram count down from the largest steered logit, `per_unit` of them for one
// unit of these.
SVDK_DEVICE int linear_bin(const Binning& b, float z) {
  const float distance = (b.top - z) * b.per_unit;
  return distance < static_cast<float>(kBins - 1) ? static_cast<int>(distance) : kBins - 1;
}

// 64-bit shared atomics are loops; two 32-bit ones with a carry are not.
SVDK_DEVICE void add_mass(unsigned long long* to, unsigned long long x) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  const uint32_t low = static_cast<uint32_t>(x);
  const uint32_t before = atomicAdd(words, low);
  const uint32_t high = static_cast<uint32_t>(x >> 32) + (before + low < before);
  if (high) atomicAdd(words + 1, high);
}

struct Scale {
  float top, rate;  // rate: units of steered logits to nats, over the temperature
  SVDK_DEVICE unsigned long long mass(float z) const {
    return static_cast<unsigned long long>(fast_exp((z - top) * rate) * kMassUnit);
  }
};

SVDK_DEVICE int bin_of(const Binning& b, float z, int id) {
  if (b.kind == kLinear) return linear_bin(b, z);
  if (b.kind == kTies ? z != b.floor : z < b.floor) return -1;
  const uint32_t key = b.kind == kTies ? static_cast<uint32_t>(id) : ~ordered_key(z);
  if (static_cast<uint64_t>(key) >> (b.shift + b.width) != b.prefix) return -1;
  return static_cast<int>((key >> b.shift) & ((1u << b.width) - 1));
}

// Fills the bins of this CTA.
template <typename T, int S>
SVDK_DEVICE void fill_bins(Cta& cta, const Operands<T, S>& row, const FastConstants& c,
                           const Scale& scale, const Binning& from, Histogram& bins) {
  const Binning binning = from;
  constexpr int N = Operands<T, S>::N;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    bins.count[i] = 0;
    bins.mass[i] = 0;
  }
  __syncthreads();
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    const float other = S == kNone ? 0.0f : y[e];
                    const float z = e < n ? c.template steered_logit<S>(w[e], other) : -kFloatInf;
                    const int bin = z == -kFloatInf ? -1 : bin_of(binning, z, at + e);
                    if (bin < 0) continue;
                    atomicAdd(&bins.count[bin], 1u);
                    add_mass(&bins.mass[bin], scale.mass(z));
                  }
                });
  }
  cta.team_barrier();
}

struct Totals {
  unsigned long long count, mass;
};
SVDK_DEVICE Totals operator+(Totals a, Totals b) { return {a.count + b.count, a.mass + b.mass}; }
SVDK_DEVICE Totals from_lane_below(Totals x, int distance) {
  return {from_lane_below(x.count, distance), from_lane_below(x.mass, distance)};
}

// One bin over all CTAs of the row.
SVDK_DEVICE Totals bin_total(const Cta& cta, Histogram& bins, int bin) {
  Totals t{0, 0};
  SVDK_ROLLED
  for (int r = 0; r < cta.size; ++r) {
    const Histogram& x = cta.size == 1 ? bins : *remote(&bins, r);
    t = t + Totals{x.count[bin], x.mass[bin]};
  }
  return t;
}

SVDK_DEVICE unsigned long long mass_target(double share, unsigned long long mass) {
  return static_cast<unsigned long long>(ceil(share * static_cast<double>(mass)));
}

// The first bin at which the target (of mass, or of tokens) is reached, into the shared `cut`; a
// target beyond the total is the total, and 0 is 1. With share >= 0 the target is that share of the
// total mass.
SVDK_DEVICE Totals find_cut(Cta& cta, Histogram& bins, bool by_mass, double share,
                            unsigned long long target, Cut& cut) {
  constexpr int kMine = kBins / kThreads;
  Totals mine{0, 0};
  const int first = thread_id() * kMine;
  SVDK_ROLLED
  for (int i = 0; i < kMine; ++i) mine = mine + bin_total(cta, bins, first + i);
  Totals all;
  const Totals until = block_scan(cta.s.slots, mine, all);  // up to and with this thread's bins
  if (share >= 0) target = mass_target(share, all.mass);
  const unsigned long long total = by_mass ? all.mass : all.count;
  if (target > total) target = total;
  if (target == 0) target = 1;
  Totals before{until.count - mine.count, until.mass - mine.mass};
  const unsigned long long start = by_mass ? before.mass : before.count;
  const unsigned long long stop = by_mass ? until.mass : until.count;
  if (start < target && target <= stop) {
    SVDK_ROLLED
    for (int i = 0; i < kMine; ++i) {
      const Totals t = bin_total(cta, bins, first + i);
      if ((by_mass ? before.mass + t.mass : before.count + t.count) >= target) {
        cut = {static_cast<uint32_t>(first + i), before.count, t.count, before.mass, t.mass};
        break;
      }
      before = before + t;
    }
  }
  cta.team_barrier();
  return all;
}

// The largest steered logit of the row.
template <typename T, int S>
SVDK_DEVICE float largest_steered(Cta& cta, const Operands<T, S>& row, const FastConstants& c) {
  constexpr int N = Operands<T, S>::N;
  float top = -kFloatInf;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int, int n, const float (&w)[N], const float (&y)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e >= n) continue;
                    top = fmaxf(top, c.template steered_logit<S>(w[e], S == kNone ? 0.0f : y[e]));
                  }
                });
  }
  const BestKey best = block_reduce(cta.s.slots, best_key(top, 0), Better());
  if (threadIdx.x == 0) cta.s.part.best = best;
  return best_score(team_best(cta));
}

// The tokens of the bins up to `limit` become the candidates of their CTAs; false if there are too
// many.
template <typename T, int S>
SVDK_DEVICE bool gather_bins(Cta& cta, const Operands<T, S>& row, const FastConstants& c,
                             Histogram& bins, const Binning& from, int limit) {
  const Binning binning = from;
  constexpr int N = Operands<T, S>::N;
  Part& part = cta.s.part;
  double mine = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i <= limit; i += kThreads) mine += bin_total(cta, bins, i).count;
  const double within = block_reduce(cta.s.slots, mine, Sum());
  if (threadIdx.x == 0) part.count = 0;
  cta.team_barrier();
  if (within > kCapacity) return false;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    const float other = S == kNone ? 0.0f : y[e];
                    const float z = e < n ? c.template steered_logit<S>(w[e], other) : -kFloatInf;
                    if (z == -kFloatInf || linear_bin(binning, z) > limit) continue;
                    part.add(at + e, w[e], other);
                  }
                });
  }
  cta.team_barrier();
  return true;
}

}  // namespace svdk::cuda
