// What happens to a row after its first sweep: strength, steering, filters, noise, diagnostics. In
// double, on the candidates; the whole vocabulary comes back into play only where it has to.
#pragma once
#include <algorithm>
#include <vector>

#include "steering.h"

namespace svdk {

struct RowMoments : Moments {
  double mass;  // of C
};

struct Scored {
  double z;
  int id;
};

// One logit.
float logit(const void* source, DType dtype, int id);
inline float warm_at(const Row& row, int id) { return logit(row.warm, row.dtype, id); }
inline float other_at(const Row& row, int id) {
  return row.base ? logit(row.base, row.dtype, id) : row.vector ? row.vector[id] : 0.0f;
}

inline double log_alpha_of(int direction, double alpha) {
  return direction == kPlain ? -kInf : std::log(alpha);
}

// The direction at one token, 0 outside C.
inline double delta_at(const Row& row, const Constants& c, int id) {
  const float w = warm_at(row, id);
  return c.in_confidence_set(w) ? c.delta_of(w, other_at(row, id)) : 0.0;
}

// The token of a row that cannot be sampled: argmax over its finite warm logits, 0 if there is
// none.
int fallback_token(const Row& row);

// Formulas of a row from its sums; mu is set later.
Constants make_constants(const Row& row, const Parameters& p, const Sums& sums);

// Keeps the candidates inside C.
void restrict_to_c(const Constants& context, std::vector<Candidate>& items);

// Sets the pivot and takes the moments of delta, over the candidates or, if they overflowed, the
// row.
RowMoments moments_of(const Row& row, const Sweeps& sweeps, Constants& context, const Sums& sums,
                      const CandidateBuffer& buffer);

// Log of the probability outside C. 1 less what is inside is good to float rounding of the whole;
// when so little is outside that rounding could matter, it is summed on its own, about its maximum:
// a strength can bring back what would underflow next to the tokens of C.
double log_outside(const Row& row, const Constants& context, double inside);

// mu for a row's strength mode.
double strength_of(const Row& row, const Parameters& p, const Constants& context, const Moments& m);

Noise noise_of(const Parameters& p);

// Greedy or perturbed argmax over scored tokens after top-k, top-p and min-p. `total` is the mass
// sum exp((z - max) / temperature) of the distribution that top-p speaks of, or negative: that of
// the tokens given (after top-k).
int draw(std::vector<Scored>& set, const Parameters& p, double total);

// Top-k, top-p and min-p over the whole vocabulary. Either fills `set` (and `total`) with few
// enough tokens to draw from, or `filter` for a second sweep; true when it filled the set.
bool select(const Row& row, const Sweeps& sweeps, const Constants& context, const Parameters& p,
            std::vector<Scored>& set, double& total, RowFilter& filter);

}  // namespace svdk
