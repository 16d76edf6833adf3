// steered_logprob: log-probabilities of labels along strengths, with slopes, curvatures and
// moments.
#pragma once
#include "sample.h"

namespace svdk::cuda {

// Sums of e = exp(z_hat - top) at one strength, with the moments of what moves with it.
struct ListPartition {
  double top, z, first, second;
  int greedy;
};

// Over the list, by one warp.
SVDK_DEVICE ListPartition list_partition(const Shared& s, const Context& c, double mu, int n) {
  double best = -DBL_MAX;
  int id = kMaxId;
  SVDK_ROLLED
  for (int i = lane_id(); i < n; i += 32) {
    const Candidate k = s.part.list[i];
    const double z = steered_of(c, mu, k.warm, k.other);
    if (z > best || id == kMaxId) {
      best = z;
      id = k.id;
    }
  }
  for (int o = 16; o; o >>= 1) {
    const double z = __shfl_xor_sync(0xffffffffu, best, o);
    const int other = __shfl_xor_sync(0xffffffffu, id, o);
    if (other != kMaxId && (id == kMaxId || z > best || (z == best && other < id))) {
      best = z;
      id = other;
    }
  }
  ListPartition part{best, 0, 0, 0, id};
  SVDK_ROLLED
  for (int i = lane_id(); i < n; i += 32) {
    const Candidate k = s.part.list[i];
    const double d = delta_of(c, k.warm, k.other);
    const double e = fast_exp(static_cast<float>(steered_of(c, mu, k.warm, k.other) - part.top));
    part.z += e;
    part.first += e * d;
    part.second += e * d * d;
  }
  part.z = warp_sum(part.z);
  part.first = warp_sum(part.first);
  part.second = warp_sum(part.second);
  return part;
}

// With the tokens outside C, whose mass relative to exp(max_w) is `mass` and whose steered logits
// are their own plus mu * penalty.
SVDK_DEVICE ListPartition with_outside(const ListPartition& in, const Context& c, double mu,
                                       double mass) {
  const double z = c.max_w + mu * c.penalty, top = fmax(in.top, z);
  const double keep = fast_exp(static_cast<float>(in.top - top));
  const double e = mass * fast_exp(static_cast<float>(z - top));
  return {top, keep * in.z + e, keep * in.first + e * c.penalty,
          keep * in.second + e * c.penalty * c.penalty, in.greedy};
}

// sum exp(w - max_w) over the tokens outside C, by one CTA alone.
template <typename T, int S>
SVDK_DEVICE double outside_sum(Cta& cta, const Pair<T, S>& row, const Context& c) {
  constexpr int N = Pair<T, kNone>::N;
  const float from = inside_from(c.max_w, c.log_alpha);
  const Pair<T, kNone> warm{row.warm, {}};
  SVDK_ROLLED
  for (int slice = 0; slice < cta.slices.count; ++slice) {
    float sum = 0;
    for_vectors(warm, cta.begin(slice), cta.end(slice),
                [&](int, int n, const float (&w)[N], const float (&)[N]) {
                  SVDK_UNROLL
                  for (int e = 0; e < N; ++e) {
                    if (e < n && w[e] < from) sum += fast_exp(w[e] - c.max_w);
                  }
                });
    sum = warp_sum(sum);
    if (lane_id() == 0) cta.s.part.sums[slice][warp_id()] = {{sum}};
  }
  double total[1];
  merge_plain(cta, total);
  return total[0];
}

struct Label {
  float warm, other;
  bool inside;
  double delta;
};

SVDK_DEVICE void write_curve(const ScoreArgs& a, int row, int m, const Context& c, double mu,
                             const Label& label, double log_z, double mean, double square,
                             int greedy) {
  const int64_t at = static_cast<int64_t>(row) * a.count + m;
  const int64_t plane = static_cast<int64_t>(a.rows.batch) * a.count;
  const double z = steered_of(c, mu, label.warm, label.other);
  const bool reachable = z >= -DBL_MAX;
  const double move = label.inside ? label.delta : c.penalty;
  a.curves[at] = reachable ? static_cast<float>(z - log_z) : -SVDK_INF;
  a.curves[plane + at] = reachable ? static_cast<float>(move - mean) : 0.0f;
  a.curves[2 * plane + at] = static_cast<float>(fmax(square - mean * mean, 0.0));
  a.greedy[at] = greedy;
}

SVDK_DEVICE double strength_at(const ScoreArgs& a, int row, int m) {
  return a.strengths ? a.strengths[m] : a.strength.at(row);
}

template <typename T, int S>
SVDK_DEVICE void refuse_score(const ScoreArgs& a, Cta& cta, const Pair<T, S>& row, bool readable) {
  const int token = readable ? fallback_token(cta.s, row, cta.vocab) : 0;
  const int64_t plane = static_cast<int64_t>(a.rows.batch) * a.count;
  SVDK_ROLLED
  for (int m = threadIdx.x; m < a.count; m += kThreads) {
    const int64_t at = static_cast<int64_t>(cta.row) * a.count + m;
    for (int k = 0; k < 3; ++k) a.curves[k * plane + at] = SVDK_NAN;
    a.greedy[at] = token;
  }
  if (threadIdx.x < 6)
    a.stats[threadIdx.x * static_cast<int64_t>(a.rows.batch) + cta.row] = SVDK_NAN;
  if (threadIdx.x == 0) a.status[cta.row] = kInvalid;
}

// The curves of a row whose C is in the list.
template <typename T, int S>
SVDK_DEVICE void score_list(const ScoreArgs& a, Cta& cta, const Pair<T, S>& row, const Context& c,
                            int n, const Label& label) {
  Shared& s = cta.s;
  const bool outside = n < c.finite && c.penalty >= -DBL_MAX;
  double mass = 0;
  if (outside) {
    double inside = 0;
    SVDK_ROLLED
    for (int i = threadIdx.x; i < n; i += kThreads) {
      inside += fast_exp(s.part.list[i].warm - c.max_w);
    }
    mass = fmax(s.sums.z_w - block_sum(s, inside), 0.0);
  }
  // The difference is good to the rounding of z_w; where that would show, the tokens outside are
  // summed on their own. Decided strength by strength, so that a grid changes no entry of it.
  const bool small = outside && mass < 0.1 * s.sums.z_w;
  for (bool exact = false;; exact = true) {
    if (threadIdx.x == 0) s.listed = 0;
    __syncthreads();
    SVDK_ROLLED
    for (int m = warp_id(); m < a.count; m += kWarps) {
      const double mu = strength_at(a, cta.row, m);
      ListPartition part = list_partition(s, c, mu, n);
      bool doubtful = false;
      if (small) {
        const ListPartition none = with_outside(part, c, mu, 0.0);
        const double shown = fast_exp(static_cast<float>(c.max_w + mu * c.penalty - none.top));
        doubtful = shown * s.sums.z_w > 3 * none.z;
      }
      if (doubtful != exact) {
        if (doubtful && lane_id() == 0) atomicAdd(&s.listed, 1u);
        continue;
      }
      if (outside) part = with_outside(part, c, mu, mass);
      if (lane_id() == 0) {
        const double log_z = part.top + static_cast<double>(logf(static_cast<float>(part.z)));
        write_curve(a, cta.row, m, c, mu, label, log_z, part.first / part.z, part.second / part.z,
                    part.greedy);
      }
    }
    __syncthreads();
    if (exact || s.listed == 0) return;
    mass = outside_sum(cta, row, c);
  }
}

// What a row has once, whatever the strengths. By thread 0.
SVDK_DEVICE void write_stats(const ScoreArgs& a, int row, const Context& c, const Label& label,
                             const Moments& m, bool base, int flags) {
  const double log_q =
      label.other == -SVDK_INF ? -static_cast<double>(SVDK_INF) : label.other - c.lse_b;
  const int64_t plane = a.rows.batch;
  a.stats[row] = static_cast<float>(label.delta - m.mean);
  a.stats[plane + row] = static_cast<float>(m.norm2);
  a.stats[2 * plane + row] = static_cast<float>(m.variance());
  a.stats[3 * plane + row] = base ? static_cast<float>(c.kl) : SVDK_NAN;
  a.stats[4 * plane + row] = static_cast<float>(label.warm - c.lse_w);
  a.stats[5 * plane + row] = base ? static_cast<float>(log_q) : SVDK_NAN;
  a.status[row] = flags & kBaseMasked;
}

template <typename T, int S>
SVDK_DEVICE void score_row(const ScoreArgs& a, Shared& s) {
  Cta cta(s, a.rows);
  Pair<T, S> row{};
  const int64_t label_id = a.labels[cta.row];
  const int unreadable = open_pair(a.rows, cta.row, row);
  int bad = !alpha_is_valid(a.rows, cta.row) || label_id < 0 || label_id >= cta.vocab || unreadable;
  SVDK_ROLLED
  for (int m = threadIdx.x; m < a.count; m += kThreads) {
    bad |= !is_finite(strength_at(a, cta.row, m));
  }
  bool invalid = block_count(s, bad) > 0;
  if (!invalid) {
    if (!open_row(cta, a.rows, row, log_alpha_of(a.rows, cta.row))) return;
    invalid = s.verdict.next == kFinished;
  }
  if (invalid) {
    if (cta.leads()) refuse_score(a, cta, row, unreadable < 2);
    return;
  }
  Context& c = s.verdict.context;
  const int listed = s.verdict.listed;
  if (listed >= 0) {
    if (!cta.leads()) return;
    cta.go_alone();
  }
  cta.team_barrier();  // the verdict has been read
  if (threadIdx.x == 0) c.inside_from = inside_from(c.max_w, c.log_alpha);
  __syncthreads();
  const int at = static_cast<int>(label_id);
  Label label{read_one(row.warm, at), other_at(row, at), false, 0.0};
  label.inside = is_inside(c, label.warm);
  if (label.inside) label.delta = delta_of(c, label.warm, label.other);
  const Moments moments = listed >= 0 ? list_moments(s, c, listed) : whole_moments(cta, row, c);
  const bool writes = cta.leads() && threadIdx.x == 0;
  if (writes) write_stats(a, cta.row, c, label, moments, S == kBase, s.sums.flags);
  if (listed >= 0) {
    score_list(a, cta, row, c, listed, label);
    return;
  }
  SVDK_ROLLED
  for (int m = 0; m < a.count; ++m) {
    if (threadIdx.x == 0) c.mu = strength_at(a, cta.row, m);
    __syncthreads();
    const Partition part = whole_partition(cta, row, c);
    if (!writes) continue;
    const double log_z = part.max + static_cast<double>(logf(static_cast<float>(part.z)));
    write_curve(a, cta.row, m, c, c.mu, label, log_z, part.first / part.z, part.second / part.z,
                best_id(part.greedy));
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) steered_logprob_kernel(ScoreArgs a) {
  SVDK_SHARED(Shared, s);
  score_row<T, S>(a, s);
}

}  // namespace svdk::cuda
