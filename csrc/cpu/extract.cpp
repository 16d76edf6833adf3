// extract: steps 1 to 5 of every row, then the probability and the direction of each token of its
// confidence set.
#include "candidates.h"
#include "ops.h"

namespace svdk {

void extract_rows(const Runtime& runtime, const BatchLogits& rows, const Parameters* parameters,
                  Extracted* extracted, ExtractOutput* out) {
  runtime.parallel(rows.batch, [&](int64_t i) {
    const RowLogits row = rows.at(i);
    RowState state;
    if (!open_row(row, parameters[i], *runtime.sweeps, state)) {
      const float nan = static_cast<float>(kNaN);
      out[i] = {nan, nan, nan, kInvalid, 0};
      return;
    }
    const Constants& c = state.constants;
    out[i] = {static_cast<float>(row.base ? c.kl : kNaN), c.max_w,
              static_cast<float>(c.max_w + c.log_zw), state.sums.status(),
              confidence_set_size(row, state)};
    extracted[i].constants = c;
    extracted[i].overflow = state.overflow();
    if (!state.overflow()) {
      const std::vector<Candidate>& tokens = state.candidates.tokens;
      extracted[i].tokens.assign(tokens.begin(), tokens.end());
    }
  });
}

void extract_entries(const RowLogits& row, const Extracted& extracted, ExtractEntries to) {
  const Constants& c = extracted.constants;
  auto put = [&](int id, float w, float other) {
    *to.ids++ = id;
    *to.p++ = static_cast<float>(std::exp(c.log_p_of(w)));
    *to.delta++ = static_cast<float>(c.delta_of(w, other));
  };
  if (!extracted.overflow) {
    for (const Candidate& k : extracted.tokens) put(k.id, k.warm, k.other);
    return;
  }
  for (int i = 0; i < row.vocab; ++i) {
    const float w = row.warm_at(i);
    if (c.in_confidence_set(w)) put(i, w, row.other_at(i));
  }
}

}  // namespace svdk
