// Steps 3 to 5, 7 to 9 and 11 on the candidates.
#include "candidates.h"

#include <algorithm>

namespace svdk {

void merge(RowState& to, const Sums& sums, Candidates& candidates) {
  to.sums.merge(sums);
  std::vector<Candidate>& tokens = to.candidates.tokens;
  to.candidates.overflow |= candidates.overflow;
  tokens.insert(tokens.end(), candidates.tokens.begin(), candidates.tokens.end());
}

bool close_row(const RowLogits& row, const Parameters& p, RowState& state) {
  if (!state.sums.valid()) return false;
  const Constants& c = state.constants = make_constants(row, p, state.sums);
  if (state.overflow()) return true;
  std::vector<Candidate>& tokens = state.candidates.tokens;
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(),
                              [&](const Candidate& k) { return !c.in_confidence_set(k.warm); }),
               tokens.end());
  return true;
}

bool open_row(const RowLogits& row, const Parameters& p, const Sweeps& sweeps, RowState& state) {
  if (!valid_parameters(p, row.vocab)) return false;
  sweeps.first_sweep(whole(row), log_alpha_of(row.direction, p.alpha), state.sums,
                     &state.candidates);
  return close_row(row, p, state);
}

int64_t confidence_set_size(const RowLogits& row, const RowState& state) {
  const Constants& c = state.constants;
  if (!state.overflow()) return static_cast<int64_t>(state.candidates.tokens.size());
  if (c.log_alpha == -kInf) return c.n_finite;
  int64_t count = 0;
  for (int i = 0; i < row.vocab; ++i) count += c.in_confidence_set(row.warm_at(i));
  return count;
}

double log_outside(const RowLogits& row, const Constants& c, double inside) {
  const double rest = 1 - inside;
  if (rest > 0.03) return std::log(rest);
  float top = -kFloatInf;
  double sum = 0;
  for (int i = 0; i < row.vocab; ++i) {
    const float w = row.warm_at(i);
    if (!c.in_confidence_set(w)) top = std::fmax(top, w);
  }
  if (top == -kFloatInf) return -kInf;
  for (int i = 0; i < row.vocab; ++i) {
    const float w = row.warm_at(i);
    if (!c.in_confidence_set(w)) sum += std::exp(static_cast<double>(w) - top);
  }
  return c.log_p_of(top) + std::log(sum);
}

RowMoments moments_of(const RowLogits& row, const Sweeps& sweeps, RowState& state) {
  MomentSums m = MomentSums::none();
  Constants& c = state.constants;
  const std::vector<Candidate>& tokens = state.candidates.tokens;
  if (c.direction == kVector) {
    const auto lower = [](const Candidate& a, const Candidate& b) { return a.warm < b.warm; };
    c.pivot = state.overflow() ? row.other_at(fallback_token(row))
                               : std::max_element(tokens.begin(), tokens.end(), lower)->other;
  }
  if (state.overflow()) {
    sweeps.moments(whole(row), c, m);
  } else {
    for (const Candidate& k : tokens) {
      m.add(std::exp(c.log_p_of(k.warm)), c.delta_of(k.warm, k.other), c.pivot);
    }
  }
  const bool everything = state.overflow() ? c.log_alpha == -kInf : state.complete();
  // Without a pivot the mass outside the confidence set has no part in the sums.
  const double outside = c.pivot == 0 ? 1 - m.mass
                         : everything ? 0.0
                                      : std::exp(log_outside(row, c, m.mass));
  return {m.moments(c.pivot, outside, m.mass + outside), m.mass};
}

Partition partition_of(const RowState& state, double strength, double log_outside) {
  Partition part;
  Constants c = state.constants;
  c.mu = strength;
  const std::vector<Candidate>& tokens = state.candidates.tokens;
  // The logit, less max_w, that the tokens outside have together.
  const double together = log_outside + c.log_zw + c.mu * c.penalty;
  const bool has_outside = log_outside > -kInf && !c.drops_outside();
  if (has_outside) part.rescale(c.max_w + together, c.penalty);
  for (const Candidate& k : tokens) {
    const double z = c.steered_logit(k.warm, k.other);
    if (z > part.max) part.rescale(z, c.delta_of(k.warm, k.other));
  }
  for (const Candidate& k : tokens) {
    const double z = c.steered_logit(k.warm, k.other);
    part.add(std::exp(z - part.max), c.delta_of(k.warm, k.other));
    part.greedy.offer(z, k.id);
  }
  if (has_outside) part.add(std::exp((c.max_w - part.max) + together), c.penalty);
  return part;
}

std::vector<SteeredToken> steered_logits(const Constants& c, const std::vector<Candidate>& tokens) {
  std::vector<SteeredToken> steered;
  for (const Candidate& k : tokens) steered.push_back({c.steered_logit(k.warm, k.other), k.id});
  return steered;
}

void weigh(std::vector<SteeredToken>& tokens, const Parameters& p) {
  double top = -kInf;
  for (const SteeredToken& s : tokens) top = std::fmax(top, s.z);
  for (SteeredToken& s : tokens) s.mass = std::exp((s.z - top) / p.temperature);
}

int draw_candidates(const std::vector<SteeredToken>& tokens, const Parameters& p) {
  if (p.greedy()) {
    Best best = Best::none();
    for (const SteeredToken& s : tokens) best.offer(s.z, s.id);
    return best.id;
  }
  std::vector<double> masses;
  for (const SteeredToken& s : tokens) masses.push_back(s.mass);
  const double share = row_uniform(p.seed, p.offset);
  return tokens[land(masses.data(), static_cast<int>(masses.size()), share).place].id;
}

}  // namespace svdk
