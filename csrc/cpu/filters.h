// Step 10: top-k, top-p and min-p, on a list of tokens or over the whole vocabulary.
#pragma once
#include "candidates.h"

namespace svdk {

// Whether top-k takes anything out of a row.
inline bool cuts_by_k(const Parameters& p, int vocab) { return p.top_k > 0 && p.top_k < vocab; }

// From which steered logit up the filters want to see all tokens of a row: what its sweep found it
// in. Asked again, with a higher `attempt`, when these were not enough; NaN: more than a list
// holds.
double filter_bound(const Parameters& p, int vocab, const Tops& tops, const MassSum& total,
                    int attempt);

// The tokens to draw from, in order of id. `total` is the mass of the distribution that top-p
// speaks of, in their unit; -1: that of the tokens themselves. Below `bound` some may be missing.
struct ShortList {
  std::vector<SteeredToken> tokens;
  double total = -1, bound = -kInf;
};

// Leaves what stays, in order of id; false when the list might lack some of it.
bool filter_candidates(ShortList& list, const Parameters& p);

// The floor that min-p sets, as the least float that stays; -inf without it.
float min_p_floor(double top, const Parameters& p);

// Finds where top-k or top-p cuts a row that keeps more than a list holds: by looking into ranges
// of steered logits, the first of them by a sample of the row, until one with the cut is small
// enough to be listed.
class RangeSearch {
 public:
  // For the k-th largest or, if k is 0, for the fewest tokens that have `share` of the mass of
  // those from `floor` up.
  RangeSearch(const RowLogits& row, const Constants& c, const Draw& draw, int64_t k, double share,
              MassSum mass, float floor);

  bool by_k() const { return k_ > 0; }
  const Range& range() const { return range_; }
  // Takes in what the sweeps found in the range, with masses in the unit of the row; whether the
  // cut is known now.
  bool narrow(const Sweeps& sweeps, const std::vector<const RangeFindings*>& slices,
              const MassSum& above, const MassSum& from);

  // The cut, the mass from it up, and whether the tokens that were listed decide on it.
  Filter filter() const { return filter_; }
  MassSum mass() const { return {unit_, kept_}; }
  bool listed() const { return listed_; }
  // The mass of a steered logit, or of some, in the unit of the row.
  double mass_of(double z) const { return std::exp((z - unit_) * draw_.inverse_temperature); }
  double mass_of(const MassSum& m) const { return m.sum > 0 ? m.sum * mass_of(m.max) : 0; }

 private:
  void choose();

  const RowLogits& row_;
  const Constants& constants_;
  const Draw draw_;
  const int64_t k_;
  const double share_;
  double unit_, target_;  // the steered logit whose mass counts 1, and the mass that is looked for
  uint32_t low_, high_;   // keys between which the cut is
  Range range_;
  std::vector<SteeredToken> sample_;
  int tries_ = 0;
  Filter filter_ = Filter::none();
  double kept_ = 0;
  bool listed_ = false;
};

}  // namespace svdk
