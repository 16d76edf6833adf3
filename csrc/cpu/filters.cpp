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

// The last of the fewest likeliest tokens whose mass reaches a budget, and all their mass; those
// of all tokens where it falls short.
struct Prefix {
  SteeredToken last;
  double mass;
};

template <typename Mass>
Prefix prefix_of(std::vector<SteeredToken> tokens, double budget, const Mass& mass_of) {
  const auto at = [&](size_t i) { return tokens.begin() + i; };
  size_t low = 0, high = tokens.size(), step = 64;
  double mass = 0;
  bool within = false;  // whether the last one is known to be in [low, high)
  while (high - low > 64) {
    const size_t middle = low + (within ? (high - low) / 2 : std::min(step, high - low - 1));
    std::nth_element(at(low), at(middle), at(high), before);
    double part = 0;
    for (size_t i = low; i < middle; ++i) part += mass_of(tokens[i].z);
    if (mass + part < budget) {
      mass += part;
      low = middle;
      step *= 2;
    } else {
      high = middle;
      within = true;
    }
  }
  std::sort(at(low), at(high), before);
  for (size_t i = low; i < high; ++i) {
    mass += mass_of(tokens[i].z);
    if (!(mass < budget)) return {tokens[i], mass};
  }
  return {tokens[high - 1], mass};
}

}  // namespace

void Nearest::rise(double top, const MassSum* block, double seen, const Draw& draw) {
  // Rounded down, as the least that is looked at.
  bound = std::max(bound, std::nextafter(top - reach, -kInf));
  if (below_mass == kInf || !block) return;
  if (block->max > mass.max) {
    mass.sum *= std::exp((mass.max - block->max) * draw.inverse_temperature);
    mass.max = block->max;
  }
  mass.sum += block->sum * std::exp((block->max - mass.max) * draw.inverse_temperature);
  // What the whole row has is between this and this over `seen`.
  const double logit = mass.max + std::log(mass.sum / std::sqrt(seen)) / draw.inverse_temperature;
  bound = std::max(bound, logit - below_mass);
}

void Nearest::raise() {
  if (k > 0) bound = std::max(bound, kth_largest(tokens, k));
  drop(tokens, [&](const SteeredToken& s) { return s.z < bound; });
  if (tokens.size() > room / 4 * 3) room *= 2;
  overflow = room > kCapacity;
  if (overflow) tokens = {};
}

Nearest nearest_for(const Parameters& p, int vocab) {
  Nearest n;
  const bool by_k = p.top_k > 0 && p.top_k < vocab, by_p = p.top_p < 1;
  if (by_k) {
    n.k = p.top_k;
    n.room = std::max<int64_t>(4 * std::min<int64_t>(p.top_k, kCapacity), 256);
    n.overflow = p.top_k > kCapacity / 4;
  } else if (by_p) {
    // A rule of thumb from the logits of real models: all that is further down has less than 1 - p
    // of the mass. (It surely has without the 1 / 32. What is found is checked.)
    n.below_mass = p.temperature * (std::log(vocab / 32.0 + 1) - std::log1p(-p.top_p));
  }
  if (p.min_p > 0 && !(by_k && by_p)) {
    n.reach = std::min(n.reach, -p.temperature * std::log(p.min_p));
  }
  return n;
}

bool filter_candidates(ShortList& list, const Parameters& p) {
  std::vector<SteeredToken>& tokens = list.tokens;
  const double inverse = 1.0 / p.temperature, lowest = std::log(p.min_p);
  bool complete = list.bound == -kInf;
  if (tokens.empty()) return false;
  const double top = std::min_element(tokens.begin(), tokens.end(), before)->z;
  const auto mass_of = [&](double z) { return std::exp((z - top) * inverse); };
  double total = list.total.max == -kInf ? -1 : list.total.sum * mass_of(list.total.max);
  if (p.top_k > 0 && static_cast<uint64_t>(p.top_k) < tokens.size()) {
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
    for (const SteeredToken& s : tokens) total += mass_of(s.z);
  }
  if (p.min_p > 0) {
    complete |= (std::nextafter(list.bound, -kInf) - top) * inverse < lowest;
    drop(tokens,
         [&](const SteeredToken& s) { return s.z < top && (s.z - top) * inverse < lowest; });
  }
  if (p.top_p < 1) {
    const double budget = p.top_p * total;
    const Prefix kept = prefix_of(tokens, budget, mass_of);
    if (!complete && (kept.mass < budget || kept.last.z < list.bound)) return false;
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
      if (z >= floor && is_finite(z)) sample_.push_back(z);
    }
  }
  std::sort(sample_.begin(), sample_.end(), std::greater<float>());
  choose();
}

// The next range: around where the sample has the cut, wider from try to try; then by halves.
void RangeSearch::choose() {
  uint32_t from = low_ + (high_ - low_ + 1) / 2, to = high_;
  const int size = static_cast<int>(sample_.size());
  if (tries_ < 3 && size > 0) {
    int place = static_cast<int>(static_cast<double>(k_) / row_.vocab * size);
    if (k_ == 0) {
      double all = 0, reached = 0;
      for (float z : sample_) all += mass_of(z);
      while (place < size - 1 && reached < share_ * all) reached += mass_of(sample_[place++]);
    }
    const double deviation = std::sqrt(place * (1 - static_cast<double>(place) / size));
    const int wide = static_cast<int>(3 * deviation + 2) << 2 * tries_;
    to = place < wide ? high_ : std::min(high_, ordered_key(sample_[place - wide]));
    from = place + wide < size ? std::max(low_, ordered_key(sample_[place + wide])) : low_;
    if (from > to) from = low_, to = high_;
  }
  ++tries_;
  range_ = {key_value(from), key_value(to)};
}

bool RangeSearch::narrow(const Sweeps& sweeps, const RangeFindings& found, const MassSum& above,
                         const MassSum& from) {
  const double higher = mass_of(above), all = mass_of(from);
  const int64_t count = found.above + found.inside;
  const uint32_t low = ordered_key(range_.low), high = ordered_key(range_.high);
  if (found.above > 0 && (k_ ? found.above >= k_ : higher >= target_)) {
    low_ = high + 1;
  } else if ((k_ ? count < k_ : all < target_) || found.inside == 0) {
    if (low == low_) {  // everything stays
      filter_ = {range_.low, kMaxId};
      kept_ = all;
      return true;
    }
    high_ = low - 1;
  } else if (static_cast<size_t>(found.inside) == found.tokens.size()) {
    if (k_) {
      const double kth = kth_largest(found.tokens, k_ - found.above);
      filter_ = {static_cast<float>(kth), kMaxId};
      kept_ = higher;
      for (const SteeredToken& s : found.tokens) kept_ += s.z >= kth ? mass_of(s.z) : 0;
    } else {
      const auto mass = [this](double z) { return mass_of(z); };
      const Prefix kept = prefix_of(found.tokens, target_ - higher, mass);
      filter_ = {static_cast<float>(kept.last.z), kept.last.id};
      kept_ = higher + kept.mass;
    }
    return true;
  } else if (low == high) {  // all ties
    const double each = (all - higher) / static_cast<double>(found.inside);
    const double ties = std::ceil((target_ - higher) / each),
                 most = static_cast<double>(found.inside);
    const int64_t n = k_ ? found.inside : static_cast<int64_t>(std::fmin(std::fmax(ties, 1), most));
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
