// The specification once more (svdk/ops/reference.py), in double and per token, with a bound on how
// far a kernel that sums in float may be off. It shares no code with the kernels.
#pragma once
#include <algorithm>

#include "../../csrc/philox.h"
#include "problem.h"

namespace fuzz {

constexpr double kFloatSum = 1e-5;  // relative error of a float sum of exponentials
// Below this difference to the maximum a float exponential is 0. It matters where it meets 1e38.
constexpr double kDust = -86;

struct Oracle {
  int direction = svdk::kPlain;
  bool invalid = false, base_masked = false;
  int64_t fallback_token = 0, candidates = 0, n_finite = 0;
  double max_w = -svdk::kInf, max_b = -svdk::kInf, log_zw = 0, log_zb = 0, kl = 0, kl_error = 0;
  double mu = 0, mu_error = 0;
  double mean = 0, norm2 = 0, variance = 0, mean_error = 0, variance_error = 0, norm2_error = 0;
  std::vector<double> w, o, p, delta, delta_error;
  double log_p_of(int64_t t) const { return w[t] - max_w - log_zw; }
  double log_q_of(int64_t t) const {
    return o[t] == -svdk::kInf ? -svdk::kInf : o[t] - max_b - log_zb;
  }
  std::vector<char> inside;
  bool edge = false;  // some token is on the rim of C, within rounding
};

// log sum exp(x - top): apart from top, next to which it would be lost where logits are huge.
inline double log_sum(const std::vector<double>& x, double top) {
  double sum = 0;
  for (double v : x) sum += v == -svdk::kInf ? 0 : std::exp(v - top);
  return std::log(sum);
}

inline bool unit(double x) { return x >= 0 && x <= 1; }

inline bool invalid_parameters(const Problem& problem, const svdk::Parameters& q) {
  if (!unit(q.alpha)) return true;
  if (problem.operation == kExtract) return false;
  if (problem.operation == kLogprob) {
    if (q.label < 0 || q.label >= problem.vocab) return true;
    for (double mu : problem.strengths) {
      if (!std::isfinite(mu)) return true;
    }
    return false;
  }
  if (q.mode == svdk::kLabel && (q.label < 0 || q.label >= problem.vocab)) return true;
  if (q.mode == svdk::kKlBudget && q.strength < 0) return true;
  return !std::isfinite(q.strength) || !std::isfinite(q.temperature) || q.temperature < 0 ||
         !unit(q.top_p) || !unit(q.min_p) || q.top_k < 0;
}

inline void find_strength(const svdk::Parameters& q, Oracle& r) {
  r.mu = q.strength;
  if (q.mode == svdk::kKlBudget) {
    r.mu = r.variance < svdk::kEps ? 0 : std::sqrt(2 * q.strength / r.variance);
    const bool close = std::fabs(r.variance - svdk::kEps) <= r.variance_error + 1e-15;
    r.mu_error = close ? svdk::kInf : r.mu == 0 ? 0 : r.mu * r.variance_error / r.variance;
  } else if (q.mode == svdk::kLabel) {
    const double gain = r.delta[q.label] - r.mean;
    r.mu = r.norm2 < svdk::kEps ? 0 : gain / (r.norm2 + svdk::kEps);
    const bool close = std::fabs(r.norm2 - svdk::kEps) <= r.norm2_error + 1e-15;
    r.mu_error = close                  ? svdk::kInf
                 : r.norm2 < svdk::kEps ? 0
                                        : (r.delta_error[q.label] + r.mean_error) / r.norm2 +
                                              std::fabs(r.mu) * r.norm2_error / r.norm2;
  }
}

inline Oracle solve(const Problem& problem, int i) {
  const svdk::Parameters& q = problem.parameters[i];
  const int vocab = problem.vocab;
  const size_t from = static_cast<size_t>(i) * vocab;
  Oracle r;
  r.direction = problem.direction;
  r.w.assign(problem.warm.values.begin() + from, problem.warm.values.begin() + from + vocab);
  r.o.assign(vocab, 0.0);
  if (problem.uses != 2)
    r.o.assign(problem.other.values.begin() + from, problem.other.values.begin() + from + vocab);

  r.invalid = invalid_parameters(problem, q);
  double best = -svdk::kInf;
  for (int t = 0; t < vocab; ++t) {
    const double w = r.w[t], o = r.o[t];
    if (std::isfinite(w)) {
      ++r.n_finite;
      if (w > best) best = w, r.fallback_token = t;
    }
    r.invalid |= std::isnan(w) || w == svdk::kInf || std::isnan(o) || o == svdk::kInf;
    r.invalid |= problem.uses == 1 && o == -svdk::kInf;
    r.base_masked |= problem.uses == 0 && std::isfinite(w) && o == -svdk::kInf;
    r.max_b = std::fmax(r.max_b, o);
  }
  r.invalid |= r.n_finite == 0;
  if (r.invalid) return r;

  r.max_w = best;
  r.log_zw = log_sum(r.w, r.max_w);
  r.log_zb = log_sum(r.o, r.max_b);
  r.p.assign(vocab, 0.0);
  r.delta = r.delta_error = r.p;
  r.inside.assign(vocab, 0);
  double spread = 0;
  for (int t = 0; t < vocab; ++t) {
    r.p[t] = r.w[t] == -svdk::kInf ? 0 : std::exp(r.log_p_of(t));
    if (problem.uses != 0 || r.p[t] == 0 || r.o[t] == -svdk::kInf) continue;
    r.kl += r.p[t] * (r.log_p_of(t) - r.log_q_of(t));
    if (r.w[t] - r.max_w < kDust) r.kl_error += r.p[t] * std::fabs(r.log_p_of(t) - r.log_q_of(t));
    spread += r.p[t] * (1 + std::fabs(r.w[t] - r.max_w) + std::fabs(r.o[t] - r.max_b));
  }
  r.kl_error += kFloatSum * (1 + spread);
  const double log_alpha = problem.uses == 2 ? -svdk::kInf : std::log(q.alpha);
  const double ratio_error = 2 * kFloatSum + r.kl_error;
  double second = 0, weighted = 0, dust = 0;
  for (int t = 0; t < vocab; ++t) {
    if (r.w[t] == -svdk::kInf) continue;
    r.edge |= q.alpha > 0 && std::fabs(r.w[t] - r.max_w - log_alpha) <
                                 1e-13 * (1 + std::fabs(log_alpha) + std::fabs(r.max_w));
    if (!(r.w[t] - r.max_w >= log_alpha)) continue;
    r.inside[t] = 1;
    ++r.candidates;
    if (problem.uses == 1) r.delta[t] = r.o[t];
    if (problem.uses == 0 && r.o[t] != -svdk::kInf) {
      const double d = r.log_p_of(t) - r.log_q_of(t) - r.kl;
      // Large logits lose their differences to the float subtraction of the vector loops.
      const double lost = ratio_error + 1e-6 * (std::fabs(d) + 1e-1 * std::fabs(r.kl));
      r.delta[t] = r.direction == svdk::kLogRatio ? d : r.p[t] * d;
      r.delta_error[t] =
          r.direction == svdk::kLogRatio ? lost : r.p[t] * lost + 1e-5 * std::fabs(r.delta[t]);
    }
    if (r.w[t] - r.max_w < kDust) {
      dust += r.p[t] * r.delta[t] * r.delta[t];
      r.mean_error += r.p[t] * std::fabs(r.delta[t]);
      if (r.direction == svdk::kKlGradient) r.delta_error[t] += std::fabs(r.delta[t]);
    }
    r.mean += r.p[t] * r.delta[t];
    r.norm2 += r.delta[t] * r.delta[t];
    second += r.p[t] * r.delta[t] * r.delta[t];
    weighted += r.p[t] * r.delta_error[t] * r.delta_error[t];
    r.mean_error += r.p[t] * (r.delta_error[t] + 1e-5 * std::fabs(r.delta[t]));
    r.norm2_error += r.delta_error[t] * (3 * std::fabs(r.delta[t]) + r.delta_error[t]) +
                     1e-5 * r.delta[t] * r.delta[t];
  }
  double outside_mass = 1, shifted = 0;
  for (int t = 0; t < vocab; ++t) {
    if (r.inside[t]) {
      outside_mass -= r.p[t];
      if (problem.uses == 1) {  // kernels sum about the entry of the likeliest token
        const double about = std::fabs(r.delta[t] - r.delta[r.fallback_token]);
        r.mean_error += kFloatSum * r.p[t] * about;
        shifted += kFloatSum * r.p[t] * about * about;
      }
      r.variance += r.p[t] * (r.delta[t] - r.mean) * (r.delta[t] - r.mean);
    }
  }
  // Outside C delta is 0 and the mass is what the others leave.
  if (r.candidates < r.n_finite) r.variance += std::fmax(outside_mass, 0.0) * r.mean * r.mean;
  r.variance_error = 1e-5 * r.variance + 3 * std::sqrt(r.variance * weighted) + 3 * weighted +
                     dust + shifted + 1e-12 * second;
  // About 0, as it is summed without a vector, the rounding of the mass counts too: it matters
  // where the tokens of C, nearly all of the mass, move as one.
  if (problem.uses == 0) r.variance_error += kFloatSum * r.mean * r.mean;
  if (problem.operation == kSample) find_strength(q, r);
  return r;
}

// Steered logit of token t at strength mu, and how far a kernel's may be off.
struct Value {
  double z, error;
};

inline Value steered(const Oracle& r, const svdk::Parameters& q, int t, double mu,
                     double mu_error) {
  if (r.w[t] == -svdk::kInf) return {-svdk::kInf, 0};
  const double move = r.inside[t] ? r.delta[t] : q.penalty;
  if (move == -svdk::kInf) return {-svdk::kInf, 0};
  const double z = r.w[t] + mu * move;
  double error = 1e-14 * (std::fabs(r.w[t]) + std::fabs(mu * move)) +
                 (move == 0 ? 0 : mu_error * std::fabs(move));
  if (r.inside[t]) error += std::fabs(mu) * r.delta_error[t];
  return {z, r.direction == svdk::kPlain ? 0 : error};
}

}  // namespace fuzz
