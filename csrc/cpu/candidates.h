// Steps 3 to 5, 7 to 9 and 11 on the candidates, in double; the whole vocabulary comes into play
// only where they overflowed.
#pragma once
#include <vector>

#include "arch.h"

namespace svdk {

// What is known of a row after step 5: then the candidates are the confidence set, unless they
// overflowed.
struct RowState {
  Sums sums;
  Candidates candidates;
  Constants constants;

  bool overflow() const { return candidates.overflow; }
  // Whether every token that can be drawn is in the confidence set (without overflow).
  bool complete() const {
    return static_cast<int64_t>(candidates.tokens.size()) == constants.n_finite;
  }
};

// Step 3, of one more slice.
void merge(RowState& to, const Sums& sums, Candidates& candidates);

// Steps 4 and 5 from the sums and the candidates; false when the row is invalid.
bool close_row(const RowLogits& row, const Parameters& p, RowState& state);

// Steps 1 to 5 of a row that one thread handles; false when it is invalid.
bool open_row(const RowLogits& row, const Parameters& p, const Sweeps& sweeps, RowState& state);

// Tokens in the confidence set.
int64_t confidence_set_size(const RowLogits& row, const RowState& state);

struct RowMoments : Moments {
  double mass;  // of the confidence set
};

// Step 7: sets the pivot and takes the moments of delta.
RowMoments moments_of(const RowLogits& row, const Sweeps& sweeps, RowState& state);

// Log of the probability outside the confidence set. 1 less what is inside is good to float
// rounding of the whole; when so little is outside that rounding could matter, it is summed on its
// own, about its maximum: a strength can bring back what would underflow next to the tokens of the
// set.
double log_outside(const RowLogits& row, const Constants& c, double inside);

// Step 9 at a strength, with all tokens outside the confidence set as one: log_outside is the
// logarithm of the probability that they have together.
Partition partition_of(const RowState& state, double strength, double log_outside);

// Step 9.
std::vector<SteeredToken> steered_logits(const Constants& c, const std::vector<Candidate>& tokens);

// Their masses, in the unit of the largest.
void weigh(std::vector<SteeredToken>& tokens, const Parameters& p);

// Step 11: the argmax, or a draw from tokens in order of id.
int draw_candidates(const std::vector<SteeredToken>& tokens, const Parameters& p);

}  // namespace svdk
