// Step 10: top-k, top-p and min-p. Over the whole vocabulary by looking into ranges of steered
// logits instead of a sort.
#include "filters.h"

#include <algorithm>

namespace svdk {
namespace {

// The likelier first.
bool before(const SteeredToken& a, const SteeredToken& b) {
  return a.z != b.z ? a.z > b.z : a.id < b.id;
}

template <typename Test>
void drop(std::vector<SteeredToken>& tokens, const Test& test) {
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), test), tokens.end());
}

double kth_largest(const std::vector<SteeredToken>& tokens, size_t k) {
  std::vector<double> z;
  for (const SteeredToken& s : tokens) z.push_back(s.z);
  std::nth_element(z.begin(), z.begin() + (k - 1), z.end(), std::greater<double>());
  return z[k - 1];
}

uint32_t key_of(const SteeredToken& t) { return ordered_key(static_cast<float>(t.z)); }

// The last of the fewest likeliest tokens whose weights reach a target, or the last of all, and the
// sum of their weights.
struct Share {
  SteeredToken last;
  double weight;
};

using Lists = std::vector<const std::vector<SteeredToken>*>;

// By bins of ordered keys, of which the one with the target is looked into again.
template <typename Weight>
Share share_of(Lists lists, double target, const Weight& weight_of) {
  constexpr int kBinBits = 10;
  std::vector<SteeredToken> tokens, some;
  double sum = 0;
  for (bool few = false; !few;) {
    uint32_t low = ~0u, high = 0;
    size_t count = 0;
    for (const auto* list : lists) {
      count += list->size();
      for (const SteeredToken& t : *list) {
        low = std::min(low, key_of(t));
        high = std::max(high, key_of(t));
      }
    }
    few = count <= 64 || low == high;
    int shift = 0;
    while ((high - low) >> shift >> kBinBits) ++shift;
    const auto bin_of = [&](const SteeredToken& t) { return (key_of(t) - low) >> shift; };
    uint32_t bin = (high - low) >> shift;
    if (!few) {
      double weights[1 << kBinBits] = {};
      for (const auto* list : lists) {
        for (const SteeredToken& t : *list) weights[bin_of(t)] += weight_of(t);
      }
      while (bin > 0 && sum + weights[bin] < target) sum += weights[bin--];
    }
    some.clear();
    for (const auto* list : lists) {
      for (const SteeredToken& t : *list) {
        if (few || bin_of(t) == bin) some.push_back(t);
      }
    }
    std::swap(tokens, some);
    lists = {&tokens};
  }
  std::sort(tokens.begin(), tokens.end(), before);
  for (const SteeredToken& t : tokens) {
    sum += weight_of(t);
    if (!(sum < target)) return {t, sum};
  }
  return {tokens.back(), sum};
}

}  // namespace

double filter_bound(const Parameters& p, int vocab, const Tops& tops, const MassSum& total,
                    int attempt) {
  const bool by_k = cuts_by_k(p, vocab), by_p = p.top_p < 1;
  // Rounded down, as what is between the floats and the bound.
  const auto down = [&](double z) { return std::nextafter(z - tops.slack, -kInf); };
  double reach = -kInf;  // of min-p
  if (p.min_p > 0 && !(by_k && by_p)) {
    reach = down(tops.top + p.temperature * std::log(p.min_p) * (1 + 1e-12));
  }
  if (by_k) {
    if (attempt > 0) return kNaN;
    const size_t k = static_cast<size_t>(p.top_k);
    std::vector<float> sorted(tops.of_stripes, tops.of_stripes + (vocab + kStripe - 1) / kStripe);
    if (k > sorted.size()) return vocab <= kCapacity ? reach : kNaN;
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    return std::max(down(sorted[k - 1]), reach);
  }
  if (!by_p) return attempt > 0 ? kNaN : reach;
  // A rule of thumb from the logits of real models: few have a token of the nucleus further below
  // the mass of the row than the first depths. Below the last one there is less than 1 - p.
  if (attempt > 4) return kNaN;
  const double depth = (attempt < 4 ? 0.62 + 0.07 * attempt : 1) * std::log(vocab);
  const double logit =
      total.max + p.temperature * (std::log(total.sum) + std::log1p(-p.top_p) - depth);
  return std::max(down(logit), reach);
}

bool filter_candidates(ShortList& list, const Parameters& p) {
  std::vector<SteeredToken>& tokens = list.tokens;
  const double inverse = 1.0 / p.temperature, lowest = std::log(p.min_p);
  bool complete = list.bound == -kInf;
  if (tokens.empty()) return false;
  const double top = std::min_element(tokens.begin(), tokens.end(), before)->z;
  double total = list.total;
  if (p.top_k > 0 && static_cast<uint64_t>(p.top_k) <= tokens.size()) {
    const double kth = kth_largest(tokens, p.top_k);
    if (kth < list.bound) return false;
    drop(tokens, [&](const SteeredToken& s) { return s.z < kth; });  // ties with the k-th stay
    complete = true;
    total = -1;
  } else if (p.top_k > 0 && !complete) {
    return false;
  }
  if (total < 0) {
    total = 0;
    for (const SteeredToken& s : tokens) total += s.mass;
  }
  if (p.min_p > 0) {
    complete |= (std::nextafter(list.bound, -kInf) - top) * inverse < lowest;
    drop(tokens,
         [&](const SteeredToken& s) { return s.z < top && (s.z - top) * inverse < lowest; });
  }
  if (p.top_p < 1) {
    const double budget = p.top_p * total;
    const Share kept = share_of({&tokens}, budget, [](const SteeredToken& t) { return t.mass; });
    if (!complete && (kept.weight < budget || kept.last.z < list.bound)) return false;
    drop(tokens, [&](const SteeredToken& s) { return before(kept.last, s); });
    return true;
  }
  return complete;
}

float min_p_floor(double top, const Parameters& p) {
  if (!(p.min_p > 0)) return -kFloatInf;
  const double most = FLT_MAX, lowest = std::log(p.min_p);
  const auto stays = [&](float z) { return (z - top) * (1.0 / p.temperature) >= lowest; };
  float floor = static_cast<float>(
      std::fmin(std::fmax(top + lowest * p.temperature, -most), std::fmin(top, most)));
  while (floor > -FLT_MAX && stays(std::nextafter(floor, -kFloatInf))) {
    floor = std::nextafter(floor, -kFloatInf);
  }
  while (floor < top && !stays(floor)) floor = std::nextafter(floor, kFloatInf);
  return floor;
}

RangeSearch::RangeSearch(const RowLogits& row, const Constants& c, const Draw& draw, int64_t k,
                         double share, MassSum mass, float floor)
    : row_(row),
      constants_(c),
      draw_(draw),
      k_(k),
      share_(share),
      unit_(mass.max),
      target_(share * mass.sum),
      low_(ordered_key(std::max(floor, -FLT_MAX))),
      high_(ordered_key(FLT_MAX)) {
  constexpr int kPlaces = 128, kEach = 8;
  for (int place = 0; place < kPlaces; ++place) {
    const int begin = static_cast<int>(static_cast<int64_t>(row.vocab) * place / kPlaces);
    for (int id = begin; id < std::min(begin + kEach, row.vocab); ++id) {
      const float z = static_cast<float>(c.steered_logit(row.warm_at(id), row.other_at(id)));
      if (z >= floor && is_finite(z)) sample_.push_back({z, id, k > 0 ? 1.0 : mass_of(z)});
    }
  }
  choose();
}

// The next range: around where the sample has the cut, wider from try to try; then by halves.
void RangeSearch::choose() {
  uint32_t from = low_ + (high_ - low_ + 1) / 2, to = high_;
  const int size = static_cast<int>(sample_.size());
  if (tries_ < 3 && size > 0) {
    const auto mass = [](const SteeredToken& t) { return t.mass; };
    double place = static_cast<double>(k_) / row_.vocab * size;
    if (k_ == 0) {
      double all = 0;
      for (const SteeredToken& t : sample_) all += t.mass;
      const double cut = share_of({&sample_}, share_ * all, mass).last.z;
      place = static_cast<double>(std::count_if(sample_.begin(), sample_.end(),
                                                [&](const SteeredToken& t) { return t.z > cut; }));
    }
    const double deviation = std::sqrt(place * (1 - place / size));
    const int wide = static_cast<int>(2 * deviation + 2) << 2 * tries_;
    const auto key_at = [&](int i) {  // of the i-th largest
      std::nth_element(sample_.begin(), sample_.begin() + i, sample_.end(), before);
      return key_of(sample_[i]);
    };
    const int first = static_cast<int>(place) - wide, last = static_cast<int>(place) + wide;
    to = first < 0 ? high_ : std::min(high_, key_at(first));
    from = last < size ? std::max(low_, key_at(last)) : low_;
    if (from > to) from = low_, to = high_;
  }
  ++tries_;
  range_ = {key_value(from), key_value(to), unit_};
}

bool RangeSearch::narrow(const Sweeps& sweeps, const std::vector<const RangeFindings*>& slices,
                         const MassSum& above, const MassSum& from) {
  int64_t n_above = 0, n_inside = 0, n_listed = 0;
  Lists lists;
  for (const RangeFindings* found : slices) {
    n_above += found->above;
    n_inside += found->inside;
    n_listed += static_cast<int64_t>(found->tokens.size());
    if (!found->tokens.empty()) lists.push_back(&found->tokens);
  }
  const double higher = mass_of(above), all = mass_of(from);
  const uint32_t low = ordered_key(range_.low), high = ordered_key(range_.high);
  if (n_above > 0 && (k_ ? n_above >= k_ : higher >= target_)) {
    low_ = high + 1;
  } else if ((k_ ? n_above + n_inside < k_ : all < target_) || n_inside == 0) {
    if (low == low_) {  // everything stays
      filter_ = {range_.low, kMaxId};
      kept_ = all;
      return true;
    }
    high_ = low - 1;
  } else if (n_inside == n_listed) {
    const double target = k_ ? static_cast<double>(k_ - n_above) : target_ - higher;
    const Share share =
        share_of(lists, target, [&](const SteeredToken& t) { return k_ ? 1.0 : t.mass; });
    filter_ = {static_cast<float>(share.last.z), k_ ? kMaxId : share.last.id};
    kept_ = higher + (k_ ? 0 : share.weight);
    for (const auto* list : k_ ? lists : Lists()) {
      for (const SteeredToken& t : *list) kept_ += t.z >= filter_.floor ? t.mass : 0;
    }
    listed_ = true;
    return true;
  } else if (low == high) {  // all ties
    const double each = (all - higher) / static_cast<double>(n_inside);
    const double ties = std::ceil((target_ - higher) / each), most = static_cast<double>(n_inside);
    const int64_t n = k_ ? n_inside : static_cast<int64_t>(std::fmin(std::fmax(ties, 1), most));
    filter_ = {range_.low, sweeps.nth_tie(whole(row_), constants_, range_.low, n)};
    kept_ = higher + static_cast<double>(n) * each;
    return true;
  } else {
    low_ = low;
    high_ = high;
    tries_ = 3;
  }
  choose();
  return false;
}

}  // namespace svdk
