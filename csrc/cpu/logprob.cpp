// steered_logprob and extract.
#include "arch_headers.h"
#include "candidates.h"
#include "ops.h"

namespace svdk {
namespace {

// The first sweep and what follows from it; false when the row is invalid.
bool open_row(const Row& row, const Parameters& p, const Sweeps& sweeps, Sums& sums,
              CandidateBuffer& buffer, Constants& context) {
  if (!valid_parameters(p, row.vocab)) return false;
  const double log_alpha = log_alpha_of(row.direction, p.alpha);
  sweeps.sums(row, 0, row.vocab, log_alpha, sums, &buffer);
  if (sums.invalid || sums.max_w == -kInf) return false;
  context = make_constants(row, p, sums);
  if (!buffer.overflow) restrict_to_c(context, buffer.items);
  return true;
}

Partition partition_of(const Constants& c, double mu, double outside_log,
                       const std::vector<Candidate>& items) {
  Partition part;
  Constants at = c;
  at.mu = mu;
  // All tokens outside as one, of the logit that they have together.
  const double together = outside_log + c.log_zw + mu * c.penalty;
  const bool has_outside = outside_log > -kInf && c.penalty != -kInf;
  if (has_outside) part.rescale(c.max_w + together, c.penalty);
  for (const Candidate& k : items) {
    const double z = at.steered_logit(k.warm, k.other);
    if (z > part.max) part.rescale(z, c.delta_of(k.warm, k.other));
  }
  for (const Candidate& k : items) {
    const double z = at.steered_logit(k.warm, k.other);
    part.add(std::exp(z - part.max), c.delta_of(k.warm, k.other));
    part.greedy.offer(z, k.id);
  }
  if (has_outside) part.add(std::exp((c.max_w - part.max) + together), c.penalty);
  return part;
}

void score_row(const Row& row, const Parameters& p, const Sweeps& sweeps, int count,
               const double* strengths, const LogprobCurves& curves, LogprobOutput& out) {
  Sums sums;
  CandidateBuffer buffer;
  Constants c;
  bool valid = p.label >= 0 && p.label < row.vocab;
  for (int m = 0; m < count; ++m) valid &= std::isfinite(strengths[m]);
  const float nan = static_cast<float>(kNaN);
  if (!valid || !open_row(row, p, sweeps, sums, buffer, c)) {
    const int token = fallback_token(row);
    for (int m = 0; m < count; ++m) {
      curves.logprob[m] = curves.slope[m] = curves.curvature[m] = nan;
      curves.greedy[m] = token;
    }
    out = {nan, nan, nan, nan, nan, nan, kInvalid};
    return;
  }
  const int label = static_cast<int>(p.label);
  const float w = warm_at(row, label), other = other_at(row, label);
  const bool inside = c.in_confidence_set(w);
  const double at_label = inside ? c.delta_of(w, other) : 0.0;

  const RowMoments moments = moments_of(row, sweeps, c, sums, buffer);
  std::vector<Partition> parts(count);
  if (buffer.overflow) {
    if (count) sweeps.partition(row, 0, row.vocab, c, strengths, count, parts.data());
  } else {
    const bool everything = static_cast<int64_t>(buffer.items.size()) == sums.n_finite;
    const double outside_log = everything ? -kInf : log_outside(row, c, moments.mass);
    for (int m = 0; m < count; ++m)
      parts[m] = partition_of(c, strengths[m], outside_log, buffer.items);
  }
  for (int m = 0; m < count; ++m) {
    const Partition& part = parts[m];
    c.mu = strengths[m];
    const double logprob = c.steered_logit(w, other) - part.max - std::log(part.z);
    const double move = inside ? at_label : c.penalty;
    curves.logprob[m] = static_cast<float>(logprob);
    curves.slope[m] = logprob == -kInf ? 0.0f : static_cast<float>(move - part.mean());
    curves.curvature[m] = static_cast<float>(part.variance());
    curves.greedy[m] = part.greedy.id;
  }
  out.gain = static_cast<float>(at_label - moments.mean);
  out.norm2 = static_cast<float>(moments.norm2);
  out.variance = static_cast<float>(moments.variance);
  out.kl = static_cast<float>(row.base ? c.kl : kNaN);
  out.logprob_warm = static_cast<float>(c.log_p_of(w));
  out.logprob_base = static_cast<float>(row.base ? c.log_q_of(other) : kNaN);
  out.status = sums.base_masked ? kBaseMasked : kOk;
}

}  // namespace

void steered_logprob(const Runtime& runtime, int64_t batch, const GetRow& row,
                     const GetParameters& parameters, int count,
                     const std::function<const double*(int64_t)>& strengths,
                     const std::function<LogprobCurves(int64_t)>& curves, LogprobOutput* out) {
  runtime.parallel(batch, [&](int64_t i) {
    score_row(row(i), parameters(i), *runtime.sweeps, count, strengths(i), curves(i), out[i]);
  });
}

void extract_rows(const Runtime& runtime, int64_t batch, const GetRow& row,
                  const GetParameters& parameters, ExtractRow* rows, ExtractOutput* out) {
  runtime.parallel(batch, [&](int64_t i) {
    const Row r = row(i);
    Sums sums;
    CandidateBuffer buffer;
    const float nan = static_cast<float>(kNaN);
    if (!open_row(r, parameters(i), *runtime.sweeps, sums, buffer, rows[i].context)) {
      out[i] = {nan, nan, nan, kInvalid, 0};
      return;
    }
    const Constants& c = rows[i].context;
    int64_t count = static_cast<int64_t>(buffer.items.size());
    if (buffer.overflow) {
      count = 0;
      for (int t = 0; t < r.vocab; ++t) count += c.in_confidence_set(warm_at(r, t));
    }
    out[i] = {static_cast<float>(r.base ? c.kl : kNaN), static_cast<float>(c.max_w),
              static_cast<float>(c.max_w + c.log_zw), sums.base_masked ? kBaseMasked : kOk, count};
    rows[i].overflow = buffer.overflow;
    if (!buffer.overflow) rows[i].items.assign(buffer.items.begin(), buffer.items.end());
  });
}

void extract_entries(const Row& row, const ExtractRow& extracted, int64_t* ids, float* p,
                     float* delta) {
  const Constants& c = extracted.context;
  auto put = [&](int id, float w, float other) {
    *ids++ = id;
    *p++ = static_cast<float>(std::exp(c.log_p_of(w)));
    *delta++ = static_cast<float>(c.delta_of(w, other));
  };
  if (!extracted.overflow) {
    for (const Candidate& k : extracted.items) put(k.id, k.warm, k.other);
    return;
  }
  for (int t = 0; t < row.vocab; ++t) {
    const float w = warm_at(row, t);
    if (c.in_confidence_set(w)) put(t, w, other_at(row, t));
  }
}

}  // namespace svdk
