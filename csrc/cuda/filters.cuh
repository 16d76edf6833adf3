// Top-k, top-p and min-p over a whole row, by histograms instead of a sort. Masses are summed in
// 64-bit fixed point: integer sums do not depend on the order of the atomics.
#pragma once
#include "full_sweep.cuh"

namespace svdk::cuda {

constexpr float kMassUnit = 0x1p40f;
constexpr float kBinsPerNat = 64.0f;

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
SVDK_DEVICE void histogram(Cta& cta, const Pair<T, S>& row, const FastContext& c,
                           const Scale& scale, const Binning& from) {
  const Binning binning = from;
  constexpr int N = Pair<T, S>::N;
  BinScratch& bins = cta.s.scratch.bins;
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
                    const float z = e < n ? c.template steered<S>(w[e], other) : -SVDK_INF;
                    const int bin = z == -SVDK_INF ? -1 : bin_of(binning, z, at + e);
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

// One bin over all CTAs of the row.
SVDK_DEVICE Totals bin_total(Cta& cta, int bin) {
  Totals t{0, 0};
  SVDK_ROLLED
  for (int r = 0; r < cta.size; ++r) {
    const BinScratch& bins = cta.size == 1 ? cta.s.scratch.bins : *remote(&cta.s.scratch.bins, r);
    t.count += bins.count[bin];
    t.mass += bins.mass[bin];
  }
  return t;
}

SVDK_DEVICE unsigned long long mass_target(double share, unsigned long long mass) {
  return static_cast<unsigned long long>(ceil(share * static_cast<double>(mass)));
}

// The first bin at which the target (of mass, or of tokens) is reached, into s.cut; a target beyond
// the total is the total, and 0 is 1. With share >= 0 the target is that share of the total mass.
SVDK_DEVICE Totals find_cut(Cta& cta, bool by_mass, double share, unsigned long long target) {
  constexpr int kMine = kBins / kThreads;
  Shared& s = cta.s;
  Totals mine{0, 0};
  const int first = static_cast<int>(threadIdx.x) * kMine;
  SVDK_ROLLED
  for (int i = 0; i < kMine; ++i) {
    const Totals t = bin_total(cta, first + i);
    mine.count += t.count;
    mine.mass += t.mass;
  }
  Totals until = mine;  // up to and with this thread's bins
  for (int o = 1; o < 32; o <<= 1) {
    const unsigned long long count = __shfl_up_sync(0xffffffffu, until.count, o);
    const unsigned long long mass = __shfl_up_sync(0xffffffffu, until.mass, o);
    if (lane_id() >= o) {
      until.count += count;
      until.mass += mass;
    }
  }
  if (lane_id() == 31) {
    s.slot64[0][warp_id()] = until.count;
    s.slot64[1][warp_id()] = until.mass;
  }
  __syncthreads();
  Totals all{0, 0};
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp_id()) {
      until.count += all.count;
      until.mass += all.mass;
    }
    all.count += s.slot64[0][i];
    all.mass += s.slot64[1][i];
  }
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
      const Totals t = bin_total(cta, first + i);
      if ((by_mass ? before.mass + t.mass : before.count + t.count) >= target) {
        s.cut = {static_cast<uint32_t>(first + i), before.count, t.count, before.mass, t.mass};
        break;
      }
      before.count += t.count;
      before.mass += t.mass;
    }
  }
  cta.team_barrier();
  return all;
}

// The largest steered logit of the row.
template <typename T, int S>
SVDK_DEVICE float largest_steered(Cta& cta, const Pair<T, S>& row, const FastContext& c) {
  constexpr int N = Pair<T, S>::N;
  float top = -SVDK_INF;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int, int n, const float (&w)[N], const float (&y)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e >= n) continue;
                    top = fmaxf(top, c.template steered<S>(w[e], S == kNone ? 0.0f : y[e]));
                  }
                });
  }
  const unsigned long long best = block_max(cta.s, best_key(top, 0));
  if (threadIdx.x == 0) cta.s.part.best = best;
  return best_score(merge_best(cta));
}

// The tokens of the bins up to `limit` into the lists of the CTAs; false if there are too many.
template <typename T, int S>
SVDK_DEVICE bool gather_bins(Cta& cta, const Pair<T, S>& row, const FastContext& c,
                             const Binning& from, int limit) {
  const Binning binning = from;
  constexpr int N = Pair<T, S>::N;
  Shared& s = cta.s;
  double mine = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i <= limit; i += kThreads) mine += bin_total(cta, i).count;
  const double within = block_sum(s, mine);
  if (threadIdx.x == 0) s.part.count = 0;
  cta.team_barrier();
  if (within > kList) return false;
  SVDK_ROLLED
  for (int slice = cta.first_slice(); slice < cta.last_slice(); ++slice) {
    for_vectors(row, cta.begin(slice), cta.end(slice),
                [&](int at, int n, const float (&w)[N], const float (&y)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    const float other = S == kNone ? 0.0f : y[e];
                    const float z = e < n ? c.template steered<S>(w[e], other) : -SVDK_INF;
                    if (z == -SVDK_INF || linear_bin(binning, z) > limit) continue;
                    push(s, at + e, w[e], other);
                  }
                });
  }
  cta.team_barrier();
  return true;
}

SVDK_DEVICE void start_search(Search& x, int kind) {
  x.bins.kind = kind;
  x.bins.shift = kind == kLinear ? 0 : 21;
  x.bins.width = 11;
  x.bins.prefix = 0;
  x.level = 0;
  x.sum = {0, 0, 0, 0, 0};
}

// The bins of the linear histogram that can hold a token to be drawn are 0 to x.limit.
SVDK_DEVICE void limit_bins(Search& x, const SampleRow& p, const Cut& cut) {
  x.limit = x.use_k || p.top_p < 1 ? static_cast<int>(cut.bin) : kBins - 1;
  if (!x.use_k && p.min_p > 0) {
    const double bins = -log(p.min_p) * p.temperature * kBinsPerNat + 2;
    if (bins < x.limit) x.limit = static_cast<int>(bins);
  }
}

// One level of a search is done: on to the next level or search. By one thread.
SVDK_DEVICE void advance(Search& x, const SampleRow& p, const Cut& cut) {
  const bool use_p = p.top_p < 1;
  if (x.bins.kind == kLinear) {
    x.done = !x.use_k && !use_p;
    x.target = static_cast<unsigned long long>(p.top_k);
    start_search(x, x.use_k ? kByCount : kByMass);
    return;
  }
  const bool by_mass = x.bins.kind == kByMass;
  if (x.level == 0) x.wanted = x.target;
  x.target -= by_mass ? cut.mass_before : cut.count_before;
  x.sum = {x.sum.bin << x.bins.width | cut.bin, x.sum.count_before + cut.count_before, cut.count,
           x.sum.mass_before + cut.mass_before, cut.mass};
  if (++x.level < 3) {
    x.bins.prefix = x.sum.bin;
    x.bins.shift = x.level == 1 ? 10 : 0;
    x.bins.width = x.level == 1 ? 11 : 10;
    return;
  }
  if (x.bins.kind == kTies) {
    x.filter.last_tie = static_cast<int>(x.sum.bin);
    x.done = true;
    return;
  }
  x.filter.floor = x.bins.floor = key_value(~x.sum.bin);
  if (!by_mass) {
    x.done = !use_p;
    start_search(x, kByMass);
    return;
  }
  // The j-th of the ties (from 0) stays while the mass before it is short of the target.
  const unsigned long long each = x.sum.mass / x.sum.count;
  const unsigned long long rest = x.wanted > x.sum.mass_before ? x.wanted - x.sum.mass_before : 1;
  x.target = (rest + each - 1) / each;
  x.done = x.target >= x.sum.count;
  start_search(x, kTies);
}

// Top-k, top-p and min-p. True: the tokens that may be drawn are among those in part.list of the
// CTAs, and s.search.total is the mass that top-p speaks of (negative: that of the list after
// top-k). False: s.search.filter says which they are.
template <typename T, int S>
SVDK_DEVICE bool select(Cta& cta, const Pair<T, S>& row, const Context& context,
                        const SampleRow& p) {
  Shared& s = cta.s;
  Search& x = s.search;
  const float largest = largest_steered(cta, row, FastContext(context));
  if (threadIdx.x == 0) {
    const int tokens = context.penalty < -DBL_MAX ? context.inside : context.finite;
    x.use_k = p.top_k > 0 && p.top_k < tokens;
    x.done = false;
    x.target = static_cast<unsigned long long>(p.top_k);
    x.bins.top = largest;
    const double nats = FastContext(context).template nats<S>();
    x.bins.per_unit = static_cast<float>(fmin(kBinsPerNat * nats, static_cast<double>(FLT_MAX)));
    x.rate = static_cast<float>(fmin(nats / p.temperature, static_cast<double>(FLT_MAX)));
    x.bins.floor = -SVDK_INF;
    x.filter = {-SVDK_INF, kMaxId};
    start_search(x, kLinear);
  }
  __syncthreads();
  do {
    histogram(cta, row, FastContext(context), Scale{x.bins.top, x.rate}, x.bins);
    const bool linear = x.bins.kind == kLinear;
    const bool by_mass = linear ? !x.use_k : x.bins.kind == kByMass;
    // The superset is taken a little wider than its rounding.
    const double share = x.level == 0 && by_mass ? p.top_p * (linear ? 1 + 1e-6 : 1.0) : -1.0;
    const Totals all = find_cut(cta, by_mass, share, x.target);
    if (threadIdx.x == 0) {
      if (share >= 0) x.target = mass_target(share, all.mass);
      if (linear) {
        limit_bins(x, p, s.cut);
        x.total = x.use_k ? -1.0 : static_cast<double>(all.mass) / kMassUnit;
      }
    }
    __syncthreads();
    if (linear && gather_bins(cta, row, FastContext(context), x.bins, x.limit)) return true;
    if (threadIdx.x == 0) advance(x, p, s.cut);
    __syncthreads();
  } while (!x.done);
  if (threadIdx.x == 0 && p.min_p > 0) {
    const float lowest = static_cast<float>(x.bins.top + log(p.min_p) / x.rate);
    if (lowest > x.filter.floor) x.filter = {fmaxf(lowest, -FLT_MAX), kMaxId};
  }
  __syncthreads();
  return false;
}

}  // namespace svdk::cuda
