// Step 10: top-k, top-p and min-p, on a short list or over the whole vocabulary.
#pragma once
#include "candidates.h"

namespace svdk {

// Puts the tokens in order, the best first, and says how many of them stay.
size_t filter_candidates(ShortList& list, const Parameters& p);

// What the filters leave of a row: few enough tokens to draw from, or a filter for one more sweep.
struct FilteredRow {
  bool is_short;
  ShortList list;
  RowFilter filter;
};

FilteredRow filter_row(const RowLogits& row, const Sweeps& sweeps, const Constants& c,
                       const Parameters& p);

}  // namespace svdk
