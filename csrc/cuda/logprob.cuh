// steered_logprob: log-probabilities of labels along strengths, with slopes, curvatures and
// moments. All steps but 8, 10 and 11; step 9 once a strength.
#pragma once
#include "candidates.cuh"
#include "full_sweep.cuh"
#include "reduce.cuh"
#include "steering.cuh"
#include "sweep.cuh"
#include "team.cuh"

namespace svdk::cuda {

struct LogprobShared {
  RowShared row;
  Candidate unordered[kCapacity];
};

// The token whose log-probability is asked for.
struct Label {
  float warm, other;
  bool inside;
  double delta;  // 0 outside C
};

// What is reported of a label at one strength.
struct CurvePoint {
  double logprob, mean, variance;
  int greedy;
};

SVDK_DEVICE void write_point(const LogprobArgs& a, int row, int m, const Constants& c,
                             const Label& label, const CurvePoint& x) {
  const int64_t at = static_cast<int64_t>(row) * a.count + m;
  const int64_t plane = static_cast<int64_t>(a.rows.batch) * a.count;
  const double move = label.inside ? label.delta : c.penalty;
  a.curves[at] = static_cast<float>(x.logprob);
  a.curves[plane + at] = x.logprob < -DBL_MAX ? 0.0f : static_cast<float>(move - x.mean);
  a.curves[2 * plane + at] = static_cast<float>(x.variance);
  a.greedy[at] = x.greedy;
}

SVDK_DEVICE double strength_at(const LogprobArgs& a, int row, int m) {
  return a.strengths ? a.strengths[m] : a.rows.parameters.strength.at(row);
}

template <typename T, int S>
SVDK_DEVICE void refuse(const LogprobArgs& a, Cta& cta, const Operands<T, S>& row, bool readable) {
  const int token = readable ? fallback_token(cta.s, row, cta.vocab) : 0;
  const int64_t batch = a.rows.batch, plane = batch * a.count;
  const float nan = static_cast<float>(kNaN);
  SVDK_ROLLED
  for (int m = threadIdx.x; m < a.count; m += kThreads) {
    const int64_t at = static_cast<int64_t>(cta.row) * a.count + m;
    for (int k = 0; k < 3; ++k) a.curves[k * plane + at] = nan;
    a.greedy[at] = token;
  }
  if (threadIdx.x < 6) a.stats[threadIdx.x * batch + cta.row] = nan;
  if (threadIdx.x == 0) a.status[cta.row] = kInvalid;
}

// Step 9 for a row whose C is in the candidates, at every strength.
template <typename T, int S>
SVDK_DEVICE void curve_of_candidates(const LogprobArgs& a, Cta& cta, const Operands<T, S>& row,
                                     const Constants& c, int n, const Label& label) {
  RowShared& s = cta.s;
  double mass = -kInf;  // of the tokens outside C: its logarithm, relative to that of exp(max_w)
  if (n < c.n_finite && !c.drops_outside()) {
    double inside = 0;
    SVDK_ROLLED
    for (int i = threadIdx.x; i < n; i += kThreads) {
      inside += Math::exp(s.part.candidates[i].warm - c.max_w);
    }
    // The difference is good to the rounding of z_w; with little left, that shows in the curvature.
    const double rest = s.sums.z_w - block_reduce(s.slots, inside, Sum());
    mass = rest > 0.1 * s.sums.z_w ? Math::log(rest) : log_outside(cta, row, c);
  }
  SVDK_ROLLED
  for (int m = warp_id(); m < a.count; m += kWarps) {
    const double mu = strength_at(a, cta.row, m);
    const CandidatePartition part =
        partition_of(s, c, mu, n, mass == -kInf ? -kInf : mass + mu * c.penalty);
    if (lane_id() != 0) continue;
    const double z = c.steered_logit(mu, label.warm, label.other);
    const double logprob = z < -DBL_MAX ? -kInf : (z - part.max) - Math::log(part.z);
    write_point(a, cta.row, m, c, label, {logprob, part.mean(), part.variance(), part.greedy});
  }
}

// Step 12, what a row has once, whatever the strengths. By thread 0.
template <int S>
SVDK_DEVICE void describe(const LogprobArgs& a, Cta& cta, const Label& label, const Moments& m) {
  const Constants& c = cta.s.broadcast.constants;
  constexpr bool base = S == kBase;
  const int row = cta.row;
  const int64_t plane = a.rows.batch;
  a.stats[row] = static_cast<float>(label.delta - m.mean);
  a.stats[plane + row] = static_cast<float>(m.norm2);
  a.stats[2 * plane + row] = static_cast<float>(m.variance);
  a.stats[3 * plane + row] = static_cast<float>(base ? c.kl : kNaN);
  a.stats[4 * plane + row] = static_cast<float>(c.log_p_of(label.warm));
  a.stats[5 * plane + row] = static_cast<float>(base ? c.log_q_of(label.other) : kNaN);
  a.status[row] = cta.s.sums.exceptional.flags & kBaseMasked;
}

template <typename T, int S>
SVDK_DEVICE void logprob_row(const LogprobArgs& a, LogprobShared& s) {
  Cta cta(s.row, a.rows);
  Operands<T, S> row{};
  load_parameters(s.row, a.rows, cta.row);
  const RowParameters& p = s.row.parameters;
  const Readable readable = open_operands(a.rows, cta.row, row);
  int bad = !p.valid || readable != kBoth;
  SVDK_ROLLED
  for (int m = threadIdx.x; m < a.count; m += kThreads) {
    bad |= !is_finite(strength_at(a, cta.row, m));
  }
  bool invalid = block_reduce(s.row.slots, bad, Sum()) > 0;
  if (!invalid) {
    if (!open_row(cta, a.rows, row, s.unordered)) return;
    invalid = s.row.broadcast.next == kRefuse;
  }
  if (invalid) {
    if (cta.leads()) refuse(a, cta, row, readable != kNothing);
    return;
  }
  Constants& c = s.row.broadcast.constants;
  const int n = s.row.broadcast.n_candidates;
  if (n >= 0) {
    if (!cta.leads()) return;
    cta.go_alone();
  }
  cta.team_barrier();  // what was broadcast has been read
  if (threadIdx.x == 0) c.inside_from = inside_from(c.max_w, c.log_alpha);
  __syncthreads();
  const int at = static_cast<int>(p.label);
  Label label{read_one(row.warm, at), other_at(row, at), false, 0.0};
  label.inside = c.in_confidence_set(label.warm);
  if (label.inside) label.delta = c.delta_of(label.warm, label.other);
  const Moments moments = moments_of(cta, row, c, n);
  const bool writes = cta.leads() && threadIdx.x == 0;
  if (writes) describe<S>(a, cta, label, moments);
  if (n >= 0) {
    curve_of_candidates(a, cta, row, c, n, label);
    return;
  }
  SVDK_ROLLED
  for (int m = 0; m < a.count; ++m) {
    if (threadIdx.x == 0) c.mu = strength_at(a, cta.row, m);
    __syncthreads();
    const RowPartition x = partition_of(cta, row, c);
    if (!writes) continue;
    const FastConstants fast(c);
    const float z = fast.template steered_logit<S>(label.warm, label.other);
    write_point(a, cta.row, m, c, label,
                {log_share<S>(x, fast, z), x.mean, x.variance, best_id(x.greedy)});
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(kThreads, kMinBlocks) steered_logprob_kernel(LogprobArgs a) {
  SVDK_SHARED(LogprobShared, s);
  logprob_row<T, S>(a, s);
}

}  // namespace svdk::cuda
