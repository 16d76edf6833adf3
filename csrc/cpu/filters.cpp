// Step 10: top-k, top-p and min-p. Over the whole vocabulary by histograms of ordered keys instead
// of a sort.
#include "filters.h"

#include <algorithm>

namespace svdk {

size_t filter_candidates(ShortList& list, const Parameters& p) {
  std::vector<SteeredToken>& tokens = list.tokens;
  const double inverse = 1.0 / p.temperature;
  double total = list.total;
  size_t kept = tokens.size();
  std::sort(tokens.begin(), tokens.end(), [](const SteeredToken& a, const SteeredToken& b) {
    return a.z != b.z ? a.z > b.z : a.id < b.id;
  });
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < kept) {
    const double kth = tokens[p.top_k - 1].z;
    kept = p.top_k;
    while (kept < tokens.size() && tokens[kept].z >= kth) ++kept;  // ties with the k-th stay
    total = -1;
  }
  const double top = tokens[0].z;
  if (total < 0) {
    total = 0;
    for (size_t i = 0; i < kept; ++i) total += std::exp((tokens[i].z - top) * inverse);
  }
  const double budget = p.top_p >= 1 ? kInf : p.top_p * total;
  const double lowest = std::log(p.min_p);
  double before = 0;
  size_t i = 0;
  for (; i < kept; ++i) {
    const double x = (tokens[i].z - top) * inverse;
    if (i > 0 && (!(before < budget) || x < lowest)) break;
    before += std::exp(x);
  }
  return i;
}

namespace {

// A key such that the tokens above it fall short of the target and those from it on reach it.
struct Cut {
  uint32_t key = 0;
  double mass_before = 0, tie_mass = 0;
  int64_t count_before = 0, tie_count = 0;
};

// Walks the bins from the top until `target` (of mass, or of tokens) is reached; the last non-empty
// bin if rounding never lets it.
uint32_t walk(const Histogram& h, bool by_mass, double target, Cut& cut) {
  uint32_t bin = 0;
  bool any = false;
  for (int b = kBins - 1; b >= 0; --b) {
    if (h.count[b] == 0) continue;
    if (any) {
      cut.mass_before += cut.tie_mass;
      cut.count_before += cut.tie_count;
    }
    any = true;
    bin = b;
    cut.tie_mass = h.mass[b];
    cut.tie_count = h.count[b];
    const double reached = by_mass ? cut.mass_before + cut.tie_mass
                                   : static_cast<double>(cut.count_before + cut.tie_count);
    if (reached >= target) break;
  }
  return bin;
}

// The filters of one row.
class Selector {
 public:
  Selector(const RowLogits& row, const Sweeps& sweeps, const Constants& c, const Parameters& p)
      : row_(row), sweeps_(sweeps), constants_(c), p_(p), inverse_(1.0 / p.temperature) {
    sweeps.draw_row(whole(row), c, RowFilter(), Draw(), nullptr, best_, nullptr);
    fill(0, 21, 0);
    for (int b = 0; b < kBins; ++b) {
      tokens_ += histogram_.count[b];
      mass_ += histogram_.mass[b];
    }
    use_k_ = p.top_k > 0 && p.top_k < tokens_;
    const double lowest = best_.score + std::log(p.min_p) * p.temperature;
    const double most = FLT_MAX;
    const float min_p_floor = static_cast<float>(std::fmin(std::fmax(lowest, -most), most));
    min_p_key_ = p.min_p > 0 ? ordered_key(min_p_floor) - 1 : 0;
  }

  // The tokens of the bins that can hold one to be drawn, if these are few; `list` stays as it is
  // if not.
  bool short_list(ShortList& list) {
    const uint32_t floor_bin = lowest_bin();
    int64_t within = 0;
    for (int b = floor_bin; b < kBins; ++b) within += histogram_.count[b];
    if (within > kCapacity) return false;
    std::vector<Candidate> candidates;
    sweeps_.gather(whole(row_), constants_, floor_bin << 21, candidates);
    list.tokens = steered_logits(constants_, candidates);
    bool has_best = false;
    for (const Candidate& k : candidates) has_best |= k.id == best_.id;
    if (!has_best)
      list.tokens.push_back({best_.score, best_.id});  // its float fell below the floor
    list.total = -1;
    if (!use_k_) {
      // Where few tokens are left, their masses are taken exactly and only the rest from the
      // histogram.
      list.total = 0;
      for (uint32_t b = 0; b < floor_bin; ++b) list.total += histogram_.mass[b];
      for (const SteeredToken& s : list.tokens) {
        list.total += std::exp((s.z - best_.score) * inverse_);
      }
    }
    return true;
  }

  RowFilter filter() {
    uint32_t floor_key = 0;
    if (use_k_) {
      const Cut cut = exact_cut(false, static_cast<double>(p_.top_k), 0);
      floor_key = cut.key;
      mass_ = cut.mass_before + cut.tie_mass;
    }
    RowFilter filter;
    if (p_.top_p < 1) {
      const Cut cut = exact_cut(true, p_.top_p * mass_, floor_key);
      floor_key = cut.key;
      const double each = cut.tie_mass / static_cast<double>(cut.tie_count);
      // NaN (0 / 0, inf / inf) where logits beyond float are rounded far from the exact maximum;
      // then one.
      const double share = std::ceil((p_.top_p * mass_ - cut.mass_before) / each);
      const int64_t ties =
          static_cast<int64_t>(std::fmin(std::fmax(share, 1), static_cast<double>(cut.tie_count)));
      filter.last_tie = sweeps_.nth_tie(whole(row_), constants_, cut.key, ties);
    }
    if (min_p_key_ > floor_key) {
      floor_key = min_p_key_;
      filter.last_tie = kMaxId;
    }
    filter.best = best_.id;
    // Keys below that of -inf, 0 for "no floor" among them, are of NaNs, which nothing exceeds.
    filter.floor = key_value(std::max(floor_key, ordered_key(-kFloatInf)));
    return filter;
  }

 private:
  void fill(uint32_t floor_key, int shift, uint32_t prefix) {
    histogram_ = Histogram{};
    sweeps_.histogram(whole(row_), constants_, {shift, prefix, floor_key, best_.score, inverse_},
                      histogram_);
  }
  // The lowest bin of the first histogram that can hold a token to be drawn; with top-k the bins
  // from it on hold all of the top-k set, whose mass top-p needs.
  uint32_t lowest_bin() const {
    Cut cut;
    if (use_k_) return walk(histogram_, false, static_cast<double>(p_.top_k), cut);
    const uint32_t bin = min_p_key_ >> 21;
    if (p_.top_p >= 1) return bin;
    // The masses are of logits rounded to float, and blurred by that.
    const double blur = std::exp(1e-6 + 2.4e-7 * std::fabs(best_.score) * inverse_);
    return std::max(bin, walk(histogram_, true, p_.top_p * mass_ * blur, cut));
  }
  // One sweep for every 11 bits of the key.
  Cut exact_cut(bool by_mass, double target, uint32_t floor_key) {
    Cut c;
    for (int shift : {21, 10, 0}) {
      fill(floor_key, shift, c.key);
      c.key = (c.key << (shift == 0 ? 10 : 11)) | walk(histogram_, by_mass, target, c);
    }
    return c;
  }

  const RowLogits& row_;
  const Sweeps& sweeps_;
  const Constants& constants_;
  const Parameters& p_;
  const double inverse_;
  Best best_ = Best::none();
  Histogram histogram_;
  int64_t tokens_ = 0;
  double mass_ = 0;
  bool use_k_;
  uint32_t min_p_key_;
};

}  // namespace

FilteredRow filter_row(const RowLogits& row, const Sweeps& sweeps, const Constants& c,
                       const Parameters& p) {
  Selector selector(row, sweeps, c, p);
  FilteredRow filtered;
  filtered.is_short = selector.short_list(filtered.list);
  if (!filtered.is_short) filtered.filter = selector.filter();
  return filtered;
}

}  // namespace svdk
