// Step 10: top-k, top-p and min-p, over the candidates by rank and over a whole row by histograms.
#pragma once
#include "../common.h"
#include "filter_sweep.cuh"
#include "read.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "team.cuh"

namespace svdk::cuda {

// --- Over the candidates.

// How many of the first ranks of n candidates are kept; their steered logits are in scratch.z, and
// scratch.order (rank -> place) is filled. `total` is the mass sum exp((z - max) / temperature)
// that top-p speaks of, or negative: that of the candidates (after top-k).
SVDK_DEVICE int filter_candidates(Slots& slots, CandidateScratch& scratch, const Parameters& p,
                                  int n, double total) {
  const double* z = scratch.z;
  int* order = scratch.order;
  const double inverse = 1.0 / p.temperature;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    int rank = 0;
    SVDK_ROLLED
    for (int j = 0; j < n; ++j) rank += z[j] > z[i] || (z[j] == z[i] && j < i);
    order[rank] = i;
  }
  __syncthreads();
  int kept = n;
  if (p.top_k > 0 && p.top_k < n) {
    const double kth = z[order[p.top_k - 1]];
    int mine = 0;
    SVDK_ROLLED
    for (int i = threadIdx.x; i < n; i += kThreads) mine += z[i] >= kth;  // ties stay
    kept = block_reduce(slots, mine, Sum());
    total = -1;
  }
  const double top = z[order[0]];
  double* weight = scratch.weight;
  double sum = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    weight[i] = Math::exp((z[order[i]] - top) * inverse);
    sum += weight[i];
  }
  sum = block_reduce(slots, sum, Sum());
  const double budget = p.top_p >= 1 ? DBL_MAX : p.top_p * (total < 0 ? sum : total);
  const double lowest = p.min_p > 0 ? log(p.min_p) : -DBL_MAX;
  int mine = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    double before = 0;
    if (p.top_p < 1) {
      SVDK_ROLLED
      for (int j = 0; j < i; ++j) before += weight[j];
    }
    mine += i == 0 || (before < budget && (z[order[i]] - top) * inverse >= lowest);
  }
  return block_reduce(slots, mine, Sum());
}

// --- Over a whole row.

// The state of a search for the thresholds of a row, in the shared memory of its CTAs.
struct Search {
  Binning bins;
  int level, limit;
  bool use_k, done;
  unsigned long long target, wanted;
  Cut sum;       // of the levels so far
  Cut cut;       // of this level
  float rate;    // from steered logits to nats over the temperature
  double total;  // mass that top-p speaks of; negative: that of the candidates after top-k
  Filter filter;
};

SVDK_DEVICE void begin_search(Search& x, int kind) {
  x.bins.kind = kind;
  x.bins.shift = kind == kLinear ? 0 : 21;
  x.bins.width = 11;
  x.bins.prefix = 0;
  x.level = 0;
  x.sum = {0, 0, 0, 0, 0};
}

// The bins of the linear histogram that can hold a token to be drawn are 0 to x.limit.
SVDK_DEVICE void limit_bins(Search& x, const Parameters& p) {
  x.limit = x.use_k || p.top_p < 1 ? static_cast<int>(x.cut.bin) : kBins - 1;
  if (!x.use_k && p.min_p > 0) {
    const double bins = -log(p.min_p) * p.temperature * kBinsPerNat + 2;
    if (bins < x.limit) x.limit = static_cast<int>(bins);
  }
}

// One level of a search is done: on to the next level or search. By one thread.
SVDK_DEVICE void next_level(Search& x, const Parameters& p) {
  const Cut& cut = x.cut;
  const bool use_p = p.top_p < 1;
  if (x.bins.kind == kLinear) {
    x.done = !x.use_k && !use_p;
    x.target = static_cast<unsigned long long>(p.top_k);
    begin_search(x, x.use_k ? kByCount : kByMass);
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
    begin_search(x, kByMass);
    return;
  }
  // The j-th of the ties (from 0) stays while the mass before it is short of the target.
  const unsigned long long each = x.sum.mass / x.sum.count;
  const unsigned long long rest = x.wanted > x.sum.mass_before ? x.wanted - x.sum.mass_before : 1;
  x.target = (rest + each - 1) / each;
  x.done = x.target >= x.sum.count;
  begin_search(x, kTies);
}

// Over the whole row, by all CTAs of it. True: the tokens that may be drawn are among the
// candidates of the CTAs, and filter_candidates has to look at them, with x.total. False: x.filter
// says which they are.
template <typename T, int S>
SVDK_DEVICE bool filter_row(Cta& cta, const Operands<T, S>& row, const Constants& constants,
                            const Parameters& p, Histogram& bins, Search& x) {
  const float largest = largest_steered(cta, row, FastConstants(constants));
  if (threadIdx.x == 0) {
    const int tokens = constants.drops_outside() ? constants.n_inside : constants.n_finite;
    x.use_k = p.top_k > 0 && p.top_k < tokens;
    x.done = false;
    x.target = static_cast<unsigned long long>(p.top_k);
    x.bins.top = largest;
    const double nats = FastConstants(constants).template nats<S>();
    x.bins.per_unit = static_cast<float>(fmin(kBinsPerNat * nats, static_cast<double>(FLT_MAX)));
    x.rate = static_cast<float>(fmin(nats / p.temperature, static_cast<double>(FLT_MAX)));
    x.bins.floor = -kFloatInf;
    x.filter = Filter::none();
    begin_search(x, kLinear);
  }
  __syncthreads();
  do {
    fill_bins(cta, row, FastConstants(constants), Scale{x.bins.top, x.rate}, x.bins, bins);
    const bool linear = x.bins.kind == kLinear;
    const bool by_mass = linear ? !x.use_k : x.bins.kind == kByMass;
    // The superset is taken a little wider than its rounding.
    const double share = x.level == 0 && by_mass ? p.top_p * (linear ? 1 + 1e-6 : 1.0) : -1.0;
    const Totals all = find_cut(cta, bins, by_mass, share, x.target, x.cut);
    if (threadIdx.x == 0) {
      if (share >= 0) x.target = mass_target(share, all.mass);
      if (linear) {
        limit_bins(x, p);
        x.total = x.use_k ? -1.0 : static_cast<double>(all.mass) / kMassUnit;
      }
    }
    __syncthreads();
    if (linear && gather_bins(cta, row, FastConstants(constants), bins, x.bins, x.limit))
      return true;
    if (threadIdx.x == 0) next_level(x, p);
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
