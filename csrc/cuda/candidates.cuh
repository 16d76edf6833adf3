// Steps 7 to 9 and 11 of a row whose tokens in play are few: moments, steering and the draw over
// the candidates, in double but for exponentials and logarithms. Done by one CTA on its
// part.candidates, which are in order of id; n is their number.
#pragma once
#include "filters.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "team.cuh"

namespace svdk::cuda {

// --- Step 7.

// What moments are summed about: a vector's entry at the likeliest token, 0 for the other
// directions.
template <int S>
SVDK_DEVICE double pivot_of_candidates(RowShared& s, int n) {
  if (S != kVectorRow) return 0.0;
  BestKey best = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    best = Better()(best, best_key(s.part.candidates[i].warm, i));
  }
  return s.part.candidates[best_id(block_reduce(s.slots, best, Better()))].other;
}

template <int S>
SVDK_DEVICE MomentSums sum_candidates(RowShared& s, const Constants& c, int n, double pivot) {
  MomentSums m = MomentSums::none();
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Candidate k = s.part.candidates[i];
    m.add(Math::exp(c.log_p_of(k.warm)), c.delta_of(k.warm, k.other), pivot);
  }
  // Nobody asks for the mass of the others.
  const double mass = S == kVectorRow ? block_reduce(s.slots, m.mass, Sum()) : 1.0;
  return {mass, block_reduce(s.slots, m.first, Sum()), block_reduce(s.slots, m.second, Sum()),
          block_reduce(s.slots, m.norm2, Sum())};
}

// --- Step 9.

struct LogSum {
  double top, log_sum;  // log sum exp z = top + log_sum
};

// Steered logits into scratch.z, and their log-sum-exp.
SVDK_DEVICE LogSum steer_candidates(RowShared& s, CandidateScratch& scratch, const Constants& c,
                                    int n) {
  double top = -kInf;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Candidate k = s.part.candidates[i];
    const double z = c.steered_logit(k.warm, k.other);
    scratch.z[i] = z;
    top = fmax(top, z);
  }
  top = block_reduce(s.slots, top, Max());
  double sum = 0;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) sum += Math::exp(scratch.z[i] - top);
  return {top, Math::log(block_reduce(s.slots, sum, Sum()))};
}

// --- Step 11.

// The argmax, or the draw, over the candidates that the filters keep, whose steered logits are in
// scratch.z, `top` the largest; `total` as for filter_candidates.
SVDK_DEVICE int draw_candidates(RowShared& s, CandidateScratch& scratch, const Parameters& p, int n,
                                double top, double total) {
  BestKey found = 0;  // the first token behind the target; else the last one with mass
  if (p.greedy()) {
    Best best = Best::none();
    SVDK_ROLLED
    for (int i = threadIdx.x; i < n; i += kThreads) {
      if (scratch.z[i] >= -DBL_MAX) best.offer(scratch.z[i], i);
    }
    return s.part.candidates[block_reduce(s.slots, best, Better()).id].id;
  }
  const bool filtered = p.has_filters();
  const int kept = filtered ? filter_candidates(s.slots, scratch, p, n, total) : n;
  const double inverse = 1.0 / p.temperature;
  double* mass = scratch.weight;  // from here on in order of id
  SVDK_ROLLED
  for (int i = threadIdx.x; i < n; i += kThreads) mass[i] = 0;
  __syncthreads();
  SVDK_ROLLED
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    const int place = filtered ? scratch.order[i] : i;
    mass[place] = Math::exp((scratch.z[place] - top) * inverse);
  }
  __syncthreads();
  const int each = (n + kThreads - 1) / kThreads;
  const int first = thread_id() * each, last = first + each < n ? first + each : n;
  double mine = 0, all;
  SVDK_ROLLED
  for (int i = first; i < last; ++i) mine += mass[i];
  double reached = block_scan(s.slots, mine, all) - mine;
  const double target = row_uniform(p.seed, p.offset) * all;
  SVDK_ROLLED
  for (int i = first; i < last; ++i) {
    if (mass[i] == 0) continue;
    reached += mass[i];
    const BestKey key = reached > target ? BestKey{1} << 32 | (0xffffffffu - i) : i + 1;
    found = Better()(found, key);
  }
  found = block_reduce(s.slots, found, Better());
  const int place = found >> 32 ? best_id(found) : static_cast<int>(found) - 1;
  return s.part.candidates[place].id;
}

// --- Along mu.

// Sums along mu, with the moments of what moves with it, and the argmax.
struct CandidatePartition : PartitionOf<Math, double> {
  int greedy;
};

// At one strength, by one warp. `outside`: the steered logit less max_w that the tokens outside C
// have together, or -inf; they move by the penalty.
SVDK_DEVICE CandidatePartition partition_of(const RowShared& s, const Constants& c, double mu,
                                            int n, double outside) {
  Best best = Best::none();
  SVDK_ROLLED
  for (int i = lane_id(); i < n; i += 32) {
    const Candidate k = s.part.candidates[i];
    best.offer(c.steered_logit(mu, k.warm, k.other), i);
  }
  best = warp_reduce(best, Better());
  const Candidate first = s.part.candidates[best.id];
  CandidatePartition part{{best.score, c.delta_of(first.warm, first.other), 0, 0, 0}, first.id};
  if (c.max_w + outside > best.score) {
    part.max = c.max_w + outside;
    part.pivot = c.penalty;
  }
  SVDK_ROLLED
  for (int i = lane_id(); i < n; i += 32) {
    const Candidate k = s.part.candidates[i];
    const double z = c.steered_logit(mu, k.warm, k.other);
    part.add(Math::exp(z - part.max), c.delta_of(k.warm, k.other));
  }
  part.z = warp_reduce(part.z, Sum());
  part.first = warp_reduce(part.first, Sum());
  part.second = warp_reduce(part.second, Sum());
  if (outside != -kInf) part.add(Math::exp((c.max_w - part.max) + outside), c.penalty);
  return part;
}

}  // namespace svdk::cuda
