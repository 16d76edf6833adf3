// The CTAs that share a row: what they publish, how they wait for each other, and how what one of
// them found reaches the others. No result depends on how many CTAs there are.
#pragma once
#include "../common.h"
#include "arguments.cuh"
#include "platform.cuh"
#include "reduce.cuh"
#include "steering.cuh"

// The tests build with a smaller one, so that short rows meet every path.
#ifndef SVDK_CAPACITY
#define SVDK_CAPACITY 1024
#endif

namespace svdk::cuda {

// Candidates that a CTA keeps; a row with more of them is swept again.
constexpr int kCapacity = SVDK_CAPACITY;

// Slices are cut in whole iterations of the sweeps: the last of a slice would otherwise read
// little, and take as long as the others.
constexpr int kSliceStep = kSliceTokens < 16 * kThreads ? 64 : 16 * kThreads;

// How a row is cut: always the same way, so that sums do not depend on how many CTAs share them.
struct Slices {
  int count, length;
  SVDK_DEVICE explicit Slices(int vocab) {
    count = (vocab + kSliceTokens - 1) / kSliceTokens;
    if (count > kMaxSlices) count = kMaxSlices;
    length = ((vocab + count - 1) / count + kSliceStep - 1) / kSliceStep * kSliceStep;
    count = (vocab + length - 1) / length;
  }
};

SVDK_DEVICE Exceptional from_lane_xor(Exceptional x, int distance) {
  return {from_lane_xor(x.warm_masked, distance), from_lane_xor(x.flags, distance)};
}

// Along mu, of a whole row; max and what moves in FastConstants' units.
using Partition = PartitionOf<Math, float>;

// Four sums of a sweep over the whole row.
struct FourSums {
  double x[4];
};
SVDK_DEVICE FourSums operator+(FourSums a, const FourSums& b) {
  SVDK_UNROLL
  for (int k = 0; k < 4; ++k) a.x[k] += b.x[k];
  return a;
}
SVDK_DEVICE FourSums from_lane_xor(FourSums a, int distance) {
  SVDK_UNROLL
  for (int k = 0; k < 4; ++k) a.x[k] = from_lane_xor(a.x[k], distance);
  return a;
}

// sum exp(x - max), of the tokens outside C, or of those that may be drawn.
struct MassSum {
  double max, sum;
};

// What one warp adds up over one slice, one sweep at a time.
union WarpSums {
  RunningSums running;
  Partition partition;
  MassSum mass;
  FourSums four;
};

// What a CTA publishes about its slices of a row.
struct alignas(128) Part {
  WarpSums sums[kMaxSlices][kWarps];
  BestKey best;
  uint32_t count;  // candidates offered; those beyond kCapacity are lost
  Exceptional exceptional;
  Candidate candidates[kCapacity];

  SVDK_DEVICE bool overflow() const { return count > static_cast<uint32_t>(kCapacity); }
  SVDK_DEVICE void add(int id, float warm, float other) {
    const uint32_t place = atomicAdd(&count, 1u);
    if (place < static_cast<uint32_t>(kCapacity)) candidates[place] = {id, warm, other};
  }
};

// What a CTA that handles the candidates alone works with.
struct CandidateScratch {
  union {
    Candidate unordered[kCapacity];
    double weight[kCapacity];  // in order of rank
  };
  double z[kCapacity];  // steered logits
  int order[kCapacity];
};

enum Next : int { kRefuse, kCollect, kGoOn };

// What the first CTA of a row found out and the others need.
struct Broadcast {
  int next;
  int n_candidates;  // in the first CTA's part, exactly those of C; or -1: they are too many
  Constants constants;
};

// A row, in the shared memory of each of its CTAs. (In an order that lets seed and offset be read
// with one load.)
struct RowShared {
  Part part;
  uint32_t running;       // ordered key of the largest value so far
  uint32_t n_candidates;  // while they are compacted
  int token;              // that was drawn
  RowParameters parameters;
  Slots slots;
  Sums sums;  // of the whole row, in the CTA that merges
  Broadcast broadcast;
  bool last;  // of the CTAs that publish
};

// Published parts of a row: other CTAs' shared memory, the workspace, or our own.
struct Parts {
  Part* own;
  Part* workspace;
  int count, transport;
  SVDK_DEVICE const Part& at(int rank) const {
    if (count == 1) return *own;
    return transport == kCluster ? *remote(own, rank) : workspace[rank];
  }
};

struct Cta {
  RowShared& s;
  int row, rank, size, transport, vocab;
  Slices slices;

  SVDK_DEVICE Cta(RowShared& shared, const BatchArgs& a)
      : s(shared),
        row(static_cast<int>(blockIdx.x) / a.split),
        rank(static_cast<int>(blockIdx.x) % a.split),
        size(a.split),
        transport(a.transport),
        vocab(a.vocab),
        slices(a.vocab) {}

  SVDK_DEVICE int first_slice() const { return rank * slices.count / size; }
  SVDK_DEVICE int last_slice() const { return (rank + 1) * slices.count / size; }
  SVDK_DEVICE int begin(int slice) const { return slice * slices.length; }
  SVDK_DEVICE int end(int slice) const {
    return slice + 1 == slices.count ? vocab : (slice + 1) * slices.length;
  }
  SVDK_DEVICE int owner(int slice, int parts) const {
    return ((slice + 1) * parts - 1) / slices.count;
  }
  // The sums of one warp over one slice, of all that the row has.
  SVDK_DEVICE int entries() const { return slices.count * kWarps; }
  SVDK_DEVICE const WarpSums& entry(const Parts& parts, int e) const {
    return parts.at(owner(e / kWarps, parts.count)).sums[e / kWarps][e % kWarps];
  }
  SVDK_DEVICE bool leads() const { return rank == 0; }
  // From here on this CTA handles the whole row.
  SVDK_DEVICE void go_alone() {
    rank = 0;
    size = 1;
  }
  SVDK_DEVICE Parts own_parts() { return {&s.part, nullptr, size, transport}; }
  SVDK_DEVICE void team_barrier() {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }
  // Copies what the first CTA found out to the others.
  SVDK_DEVICE void broadcast() {
    __syncthreads();
    if (leads() && thread_id() < size && threadIdx.x > 0) {
      *remote(&s.broadcast, thread_id()) = s.broadcast;
    }
    team_barrier();
  }
};

SVDK_DEVICE void load_parameters(RowShared& s, const BatchArgs& a, int row) {
  if (threadIdx.x == 0) s.parameters = parameters_of(a, row);
  __syncthreads();
}

SVDK_DEVICE void clear_part(RowShared& s) {
  if (threadIdx.x == 0) {
    s.part.best = 0;
    s.part.count = 0;
    s.part.exceptional = {0, 0};
    s.running = ordered_key(-kFloatInf);
  }
  __syncthreads();
}

// Adds what a thread met to its CTA's part.
SVDK_DEVICE void leave_exceptional(RowShared& s, const Exceptional& x) {
  if (x.warm_masked) atomicAdd(&s.part.exceptional.warm_masked, x.warm_masked);
  if (x.flags) atomicOr(&s.part.exceptional.flags, x.flags);
}

// Makes this CTA's part visible to whoever finishes the row; false when that is another CTA. The
// workspace is left as it was found, so that a captured graph can be replayed.
SVDK_DEVICE bool publish(Cta& cta, const BatchArgs& a, Parts& parts) {
  RowShared& s = cta.s;
  parts = cta.own_parts();
  if (cta.transport != kWorkspace || cta.size == 1) {
    cta.team_barrier();
    return true;
  }
  __syncthreads();
  parts.workspace = a.parts + static_cast<int64_t>(cta.row) * cta.size;
  Part& to = parts.workspace[cta.rank];
  const int count = s.part.overflow() ? kCapacity : static_cast<int>(s.part.count);
  const int sums = (cta.last_slice() - cta.first_slice()) * kWarps;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < sums; i += kThreads) {
    const int slice = cta.first_slice() + i / kWarps;
    to.sums[slice][i % kWarps] = s.part.sums[slice][i % kWarps];
  }
  SVDK_ROLLED
  for (int i = threadIdx.x; i < count; i += kThreads) to.candidates[i] = s.part.candidates[i];
  if (threadIdx.x == 0) {
    to.best = s.part.best;
    to.count = s.part.count;
    to.exceptional = s.part.exceptional;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t ticket = atomicAdd(a.tickets + cta.row, 1u);
    s.last = ticket + 1 == static_cast<uint32_t>(cta.size);
    if (s.last) a.tickets[cta.row] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!s.last) return false;
  cta.go_alone();
  return true;
}

// --- Reductions over the CTAs of a row, between two barriers of the team. In every thread.

// Of what each CTA has in its part.
template <typename T, typename F, typename Op>
SVDK_DEVICE T team_reduce(Cta& cta, T first, const F& of, Op op) {
  const Parts parts = cta.own_parts();
  cta.team_barrier();
  const T all = reduce_over(parts.count, first, [&](int rank) { return of(parts.at(rank)); }, op);
  cta.team_barrier();
  return all;
}

// The best of part.best.
SVDK_DEVICE BestKey team_best(Cta& cta) {
  return team_reduce(cta, BestKey{0}, [](const Part& x) { return x.best; }, Better());
}

// What a warp's lanes added up over a slice, to where team_sum finds it.
SVDK_DEVICE void leave_sums(RowShared& s, int slice, FourSums x) {
  x = warp_reduce(x, Sum());
  if (lane_id() == 0) s.part.sums[slice][warp_id()].four = x;
}

// The sum of what every warp left for its slices, in the order of slices.
SVDK_DEVICE FourSums team_sum(Cta& cta) {
  const Parts parts = cta.own_parts();
  cta.team_barrier();
  const FourSums all = reduce_over(
      cta.entries(), FourSums{}, [&](int e) { return cta.entry(parts, e).four; }, Sum());
  cta.team_barrier();
  return all;
}

}  // namespace svdk::cuda
