// steered_logprob: log-probabilities of labels along strengths, with slopes, curvatures and
// moments.
#pragma once
#include "sample.cuh"

namespace svdk::cuda {

// At one strength: sums of e = exp(z_hat - top), with the moments of what moves with mu about that
// of the largest z_hat.
struct ListPartition {
  double top, pivot, z, first, second;
  int greedy;

  SVDK_DEVICE void add(double e, double moves) {
    const double d = moves - pivot;
    z += e;
    first += e * d;
    second += e * d * d;
  }
};

// Over the list, by one warp. `outside`: the steered logit less max_w that the tokens outside C
// have together, or -inf; they move by `penalty`.
SVDK_DEVICE ListPartition list_partition(const Shared& s, const Context& c, double mu, int n,
                                         double outside) {
  double best = -DBL_MAX;
  int place = kMaxId;
  SVDK_ROLLED
  for (int i = lane_id(); i < n; i += 32) {
    const double z = steered_of(c, mu, s.part.list[i].warm, s.part.list[i].other);
    if (z > best || place == kMaxId) {
      best = z;
      place = i;
    }
  }
  for (int o = 16; o; o >>= 1) {
    const double z = __shfl_xor_sync(0xffffffffu, best, o);
    const int other = __shfl_xor_sync(0xffffffffu, place, o);
    if (other != kMaxId && (place == kMaxId || z > best || (z == best && other < place))) {
      best = z;
      place = other;
    }
  }
  const Candidate first = s.part.list[place];
  ListPartition part{best, delta_of(c, first.warm, first.other), 0, 0, 0, first.id};
  if (c.max_w + outside > best) {
    part.top = c.max_w + outside;
    part.pivot = c.penalty;
  }
  SVDK_ROLLED
  for (int i = lane_id(); i < n; i += 32) {
    const Candidate k = s.part.list[i];
    const double z = steered_of(c, mu, k.warm, k.other);
    part.add(fast_exp(static_cast<float>(z - part.top)), delta_of(c, k.warm, k.other));
  }
  part.z = warp_sum(part.z);
  part.first = warp_sum(part.first);
  part.second = warp_sum(part.second);
  if (outside != -static_cast<double>(SVDK_INF)) {
    part.add(fast_exp(static_cast<float>((c.max_w - part.top) + outside)), c.penalty);
  }
  return part;
}

struct Label {
  float warm, other;
  bool inside;
  double delta;
};

SVDK_DEVICE void write_curve(const ScoreArgs& a, int row, int m, const Context& c,
                             const Label& label, double logprob, double mean, double variance,
                             int greedy) {
  const int64_t at = static_cast<int64_t>(row) * a.count + m;
  const int64_t plane = static_cast<int64_t>(a.rows.batch) * a.count;
  const double move = label.inside ? label.delta : c.penalty;
  a.curves[at] = static_cast<float>(logprob);
  a.curves[plane + at] = logprob < -DBL_MAX ? 0.0f : static_cast<float>(move - mean);
  a.curves[2 * plane + at] = static_cast<float>(variance);
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
  const double none = -static_cast<double>(SVDK_INF);
  double mass = none;  // of the tokens outside C: its logarithm, relative to that of exp(max_w)
  if (n < c.finite && c.penalty >= -DBL_MAX) {
    double inside = 0;
    SVDK_ROLLED
    for (int i = threadIdx.x; i < n; i += kThreads) {
      inside += fast_exp(s.part.list[i].warm - c.max_w);
    }
    // The difference is good to the rounding of z_w; with little left, that shows in the curvature.
    const double rest = s.sums.z_w - block_sum(s, inside);
    mass = rest > 0.1 * s.sums.z_w ? static_cast<double>(logf(static_cast<float>(rest)))
                                   : log_outside(cta, row, c);
  }
  SVDK_ROLLED
  for (int m = warp_id(); m < a.count; m += kWarps) {
    const double mu = strength_at(a, cta.row, m);
    const ListPartition part =
        list_partition(s, c, mu, n, mass == none ? none : mass + mu * c.penalty);
    if (lane_id() != 0) continue;
    const double z = steered_of(c, mu, label.warm, label.other), mean = part.first / part.z;
    const double log_z = static_cast<double>(logf(static_cast<float>(part.z)));
    write_curve(a, cta.row, m, c, label, z < -DBL_MAX ? none : (z - part.top) - log_z,
                part.pivot + mean, fmax(part.second / part.z - mean * mean, 0.0), part.greedy);
  }
}

// What a row has once, whatever the strengths. By thread 0.
SVDK_DEVICE void write_stats(const ScoreArgs& a, int row, const Context& c, const Label& label,
                             const Moments& m, bool base, int flags) {
  const int64_t plane = a.rows.batch;
  a.stats[row] = static_cast<float>(label.delta - m.mean);
  a.stats[plane + row] = static_cast<float>(m.norm2);
  a.stats[2 * plane + row] = static_cast<float>(m.variance);
  a.stats[3 * plane + row] = base ? static_cast<float>(c.kl) : SVDK_NAN;
  a.stats[4 * plane + row] = static_cast<float>(log_p_of(c, label.warm));
  a.stats[5 * plane + row] = base ? static_cast<float>(log_q_of(c, label.other)) : SVDK_NAN;
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
  const Moments moments = moments_of(cta, row, c, listed);
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
    const Summary x = whole_partition(cta, row, c);
    if (!writes) continue;
    const FastContext fast(c);
    const double share = log_share<S>(x, fast, fast.template steered<S>(label.warm, label.other));
    write_curve(a, cta.row, m, c, label, share, x.mean, x.variance, best_id(x.greedy));
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) steered_logprob_kernel(ScoreArgs a) {
  SVDK_SHARED(Shared, s);
  score_row<T, S>(a, s);
}

}  // namespace svdk::cuda
