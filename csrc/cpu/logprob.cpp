// steered_logprob: steps 1 to 7 of every row, then the log-probability of its label at each
// strength, with slope, curvature and the greedy token.
#include "candidates.h"
#include "ops.h"

namespace svdk {
namespace {

void refuse(const RowLogits& row, int count, const LogprobCurves& curves, LogprobOutput& out) {
  const int token = fallback_token(row);
  const float nan = static_cast<float>(kNaN);
  for (int m = 0; m < count; ++m) {
    curves.logprob[m] = curves.slope[m] = curves.curvature[m] = nan;
    curves.greedy[m] = token;
  }
  out = {nan, nan, nan, nan, nan, nan, kInvalid};
}

// A plain row: nothing moves with mu, and one sweep finds the sums and the greedy token.
void score_plain_row(const RowLogits& row, int label, const Sweeps& sweeps, int count,
                     const LogprobCurves& curves, LogprobOutput& out) {
  Sums sums;
  Best best = Best::none();
  Constants c;
  const SumsOnTheWay found{sums, true};
  sweeps.draw_row(whole(row), c, RowFilter(), Draw(), &found, {&best, nullptr, nullptr, nullptr});
  if (!sums.valid()) {
    refuse(row, count, curves, out);
    return;
  }
  c.max_w = static_cast<float>(sums.max_w);
  c.log_zw = std::log(sums.z_w);
  const float logprob = static_cast<float>(c.log_p_of(row.warm_at(label)));
  for (int m = 0; m < count; ++m) {
    curves.logprob[m] = logprob;
    curves.slope[m] = curves.curvature[m] = 0;
    curves.greedy[m] = best.id;
  }
  const float nan = static_cast<float>(kNaN);
  out = {0, 0, 0, nan, logprob, nan, sums.status()};
}

void score_row(const RowLogits& row, const Parameters& p, const Sweeps& sweeps,
               const Strengths& strengths, const LogprobCurves& curves, LogprobOutput& out) {
  const int count = strengths.count;
  RowState state;
  bool valid = p.label >= 0 && p.label < row.vocab;
  for (int m = 0; m < count; ++m) valid &= std::isfinite(strengths.mu[m]);
  if (valid && row.direction == kPlain && valid_parameters(p, row.vocab)) {
    score_plain_row(row, static_cast<int>(p.label), sweeps, count, curves, out);
    return;
  }
  if (!valid || !open_row(row, p, sweeps, state)) {
    refuse(row, count, curves, out);
    return;
  }
  Constants& c = state.constants;
  const int label = static_cast<int>(p.label);
  const float w = row.warm_at(label), other = row.other_at(label);
  const bool inside = c.in_confidence_set(w);
  const double delta_of_label = inside ? c.delta_of(w, other) : 0.0;

  const RowMoments moments = moments_of(row, sweeps, state);
  std::vector<Partition> parts(count);
  if (state.overflow()) {
    if (count) sweeps.partition(whole(row), c, strengths, parts.data());
  } else {
    const double outside = state.complete() ? -kInf : log_outside(row, c, moments.mass);
    for (int m = 0; m < count; ++m) parts[m] = partition_of(state, strengths.mu[m], outside);
  }
  for (int m = 0; m < count; ++m) {
    const Partition& part = parts[m];
    const double z = c.steered_logit(strengths.mu[m], w, other);
    const double logprob = z - part.max - std::log(part.z);
    const double moves = inside ? delta_of_label : c.penalty;
    curves.logprob[m] = static_cast<float>(logprob);
    curves.slope[m] = logprob == -kInf ? 0.0f : static_cast<float>(moves - part.mean());
    curves.curvature[m] = static_cast<float>(part.variance());
    curves.greedy[m] = part.greedy.id;
  }
  out.gain = static_cast<float>(delta_of_label - moments.mean);
  out.norm2 = static_cast<float>(moments.norm2);
  out.variance = static_cast<float>(moments.variance);
  out.kl = static_cast<float>(row.base ? c.kl : kNaN);
  out.logprob_warm = static_cast<float>(c.log_p_of(w));
  out.logprob_base = static_cast<float>(row.base ? c.log_q_of(other) : kNaN);
  out.status = state.sums.status();
}

}  // namespace

void steered_logprob(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                     const Strengths* strengths, const LogprobCurves& curves, LogprobOutput* out) {
  runtime.parallel(rows.batch, [&](int64_t i) {
    const Strengths own = strengths ? *strengths : Strengths{&parameters[i].strength, 1};
    const int64_t at = i * own.count;
    const LogprobCurves to{curves.logprob + at, curves.slope + at, curves.curvature + at,
                           curves.greedy + at};
    score_row(rows.at(i), parameters[i], *runtime.sweeps, own, to, out[i]);
  });
}

}  // namespace svdk
