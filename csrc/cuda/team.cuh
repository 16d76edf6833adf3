// The CTAs that share a row, their shared memory, and reductions whose result depends neither on
// the schedule nor on how many CTAs there are.
#pragma once
#include "read.cuh"

namespace svdk::cuda {

// Sums over a whole row, relative to its maxima.
struct Sums {
  float max_w, max_b;
  double z_w, z_b, usable, cross;  // usable, cross: over tokens with a finite base logit
  int dead, flags;
};

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

// The state of a search for thresholds over a whole row; see filters.cuh.
struct Search {
  Binning bins;
  int level, limit;
  bool use_k, done;
  unsigned long long target, wanted;
  Cut sum;     // of the levels so far
  float rate;  // from steered logits to nats over the temperature
  double total;
  Filter filter;
};

enum Next : int { kFinished, kCollect, kWhole };

// What the first CTA of a row found out and the others need.
struct Verdict {
  int next, listed;  // listed: entries in the first CTA's list, or -1
  Context context;
};

struct ListScratch {
  Candidate items[kList];  // reused: weights in order of rank
  double z[kList];
  int order[kList];
};
struct BinScratch {
  uint32_t count[kBins];
  unsigned long long mass[kBins];  // in units of kMassUnit
};

struct Shared {
  Part part;
  Sums sums;
  Verdict verdict;
  SampleRow sample;
  Search search;
  Noise noise;
  Cut cut;
  unsigned long long best;
  double slot[kWarps];
  unsigned long long slot64[2][kWarps];
  uint32_t running;  // ordered key of the largest warm logit so far
  uint32_t listed;
  bool last;
  union {
    ListScratch list;
    BinScratch bins;
  } scratch;
};

SVDK_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31); }
SVDK_DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

template <typename T>
SVDK_DEVICE T warp_sum(T x) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
SVDK_DEVICE float warp_max_of(float x) { return key_value(warp_max(ordered_key(x))); }

// Sum over the block, the same in every thread.
SVDK_DEVICE double block_sum(Shared& s, double x) {
  x = warp_sum(x);
  if (lane_id() == 0) s.slot[warp_id()] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += s.slot[i];
  __syncthreads();
  return total;
}

SVDK_DEVICE double block_max(Shared& s, double x) {
  for (int o = 16; o; o >>= 1) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, o));
  if (lane_id() == 0) s.slot[warp_id()] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = fmax(x, s.slot[i]);
  __syncthreads();
  return x;
}

SVDK_DEVICE unsigned long long block_max(Shared& s, unsigned long long x) {
  for (int o = 16; o; o >>= 1) {
    const unsigned long long y = __shfl_xor_sync(0xffffffffu, x, o);
    if (y > x) x = y;
  }
  if (lane_id() == 0) s.slot64[0][warp_id()] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) {
    if (s.slot64[0][i] > x) x = s.slot64[0][i];
  }
  __syncthreads();
  return x;
}

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
  Shared& s;
  int row, rank, size, transport, vocab;
  Slices slices;

  SVDK_DEVICE Cta(Shared& shared, const RowArgs& a)
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
  // One warp's sums of one slice, of all that the row has (slices.count * kWarps).
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
  // Copies the verdict to the other CTAs of the team.
  SVDK_DEVICE void hand_out() {
    __syncthreads();
    if (leads() && static_cast<int>(threadIdx.x) < size && threadIdx.x > 0) {
      *remote(&s.verdict, static_cast<int>(threadIdx.x)) = s.verdict;
    }
    team_barrier();
  }
};

SVDK_DEVICE void clear_part(Shared& s) {
  if (threadIdx.x == 0) {
    s.part.best = 0;
    s.part.count = 0;
    s.part.dead = s.part.flags = 0;
    s.running = ordered_key(-SVDK_INF);
  }
  __syncthreads();
}

// Makes this CTA's part visible to whoever finishes the row; false when that is another CTA. The
// workspace is left as it was found, so that a captured graph can be replayed.
SVDK_DEVICE bool publish(Cta& cta, const RowArgs& a, Parts& parts) {
  Shared& s = cta.s;
  parts = cta.own_parts();
  if (cta.transport != kWorkspace || cta.size == 1) {
    cta.team_barrier();
    return true;
  }
  __syncthreads();
  parts.workspace = a.parts + static_cast<int64_t>(cta.row) * cta.size;
  Part& to = parts.workspace[cta.rank];
  const int count = s.part.count < static_cast<uint32_t>(kList) ? s.part.count : kList;
  const int sums = (cta.last_slice() - cta.first_slice()) * kWarps;
  SVDK_ROLLED
  for (int i = threadIdx.x; i < sums; i += kThreads) {
    const int slice = cta.first_slice() + i / kWarps;
    to.sums[slice][i % kWarps] = s.part.sums[slice][i % kWarps];
  }
  SVDK_ROLLED
  for (int i = threadIdx.x; i < count; i += kThreads) to.list[i] = s.part.list[i];
  if (threadIdx.x == 0) {
    to.best = s.part.best;
    to.count = s.part.count;
    to.dead = s.part.dead;
    to.flags = s.part.flags;
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

// What a warp's lanes added up over a slice, to where merge_plain finds it.
SVDK_DEVICE void leave_sums(Shared& s, int slice, double a, double b, double c, double d) {
  const double x[4] = {warp_sum(a), warp_sum(b), warp_sum(c), warp_sum(d)};
  if (lane_id() == 0) {
    for (int k = 0; k < 4; ++k) s.part.sums[slice][warp_id()].d[k] = x[k];
  }
}

// Sums of the four values that every warp left in part.sums for its slices, in the order of slices.
SVDK_DEVICE void merge_plain(Cta& cta, double (&total)[4]) {
  const Parts parts = cta.own_parts();
  for (int k = 0; k < 4; ++k) total[k] = 0;
  cta.team_barrier();
  const int entries = cta.slices.count * kWarps;
  SVDK_ROLLED
  for (int e = lane_id(); e < entries; e += 32) {
    const WarpSums& x = cta.entry(parts, e);
    for (int k = 0; k < 4; ++k) total[k] += x.d[k];
  }
  for (int k = 0; k < 4; ++k) total[k] = warp_sum(total[k]);
  cta.team_barrier();
}

// The best key over the team; every CTA's is in part.best.
SVDK_DEVICE unsigned long long merge_best(Cta& cta) {
  const Parts parts = cta.own_parts();
  cta.team_barrier();
  unsigned long long best = 0;
  SVDK_ROLLED
  for (int r = 0; r < parts.count; ++r) {
    const unsigned long long key = parts.at(r).best;
    if (key > best) best = key;
  }
  cta.team_barrier();
  return best;
}

}  // namespace svdk::cuda
