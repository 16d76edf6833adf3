#include "candidates.h"

#include "../philox.h"
#include "arch_headers.h"

namespace svdk {

float logit(const void* source, DType dtype, int id) {
  if (dtype == DType::kFloat) return static_cast<const float*>(source)[id];
  const uint16_t x = static_cast<const uint16_t*>(source)[id];
  return dtype == DType::kBFloat16 ? bfloat16_to_float(x) : half_to_float(x);
}

int fallback_token(const Row& row) {
  float best = -kFloatInf;
  int token = 0;
  for (int i = 0; i < row.vocab; ++i) {
    const float w = warm_at(row, i);
    if (std::isfinite(w) && w > best) {
      best = w;
      token = i;
    }
  }
  return token;
}

Constants make_constants(const Row& row, const Parameters& p, const Sums& sums) {
  Constants c(make_constants<Math>(sums, row.direction, log_alpha_of(row.direction, p.alpha),
                                   p.penalty, row.base != nullptr));
  c.n_finite = static_cast<int>(sums.n_finite);
  return c;
}

void restrict_to_c(const Constants& context, std::vector<Candidate>& items) {
  items.erase(
      std::remove_if(items.begin(), items.end(),
                     [&](const Candidate& c) { return !context.in_confidence_set(c.warm); }),
      items.end());
}

double log_outside(const Row& row, const Constants& c, double inside) {
  const double rest = 1 - inside;
  if (rest > 0.03) return std::log(rest);
  float top = -kFloatInf;
  double sum = 0;
  for (int i = 0; i < row.vocab; ++i) {
    const float w = warm_at(row, i);
    if (!c.in_confidence_set(w)) top = std::fmax(top, w);
  }
  if (top == -kFloatInf) return -kInf;
  for (int i = 0; i < row.vocab; ++i) {
    const float w = warm_at(row, i);
    if (!c.in_confidence_set(w)) sum += std::exp(static_cast<double>(w) - top);
  }
  return c.log_p_of(top) + std::log(sum);
}

RowMoments moments_of(const Row& row, const Sweeps& sweeps, Constants& context, const Sums& sums,
                      const CandidateBuffer& buffer) {
  MomentSums m = MomentSums::none();
  const std::vector<Candidate>& items = buffer.items;
  if (context.direction == kVector) {
    const auto lower = [](const Candidate& a, const Candidate& b) { return a.warm < b.warm; };
    context.pivot = buffer.overflow ? other_at(row, fallback_token(row))
                                    : std::max_element(items.begin(), items.end(), lower)->other;
  }
  if (buffer.overflow) {
    sweeps.moments(row, 0, row.vocab, context, m);
  } else {
    for (const Candidate& c : items) {
      m.add(std::exp(context.log_p_of(c.warm)), context.delta_of(c.warm, c.other), context.pivot);
    }
  }
  const bool everything = buffer.overflow ? context.log_alpha == -kInf
                                          : static_cast<int64_t>(items.size()) == sums.n_finite;
  // Without a pivot the mass outside C has no part in the sums.
  const double outside = context.pivot == 0 ? 1 - m.mass
                         : everything       ? 0.0
                                            : std::exp(log_outside(row, context, m.mass));
  return {m.moments(context.pivot, outside, m.mass + outside), m.mass};
}

double strength_of(const Row& row, const Parameters& p, const Constants& context,
                   const Moments& m) {
  const double at_label =
      p.mode == kLabel ? delta_at(row, context, static_cast<int>(p.label)) : 0.0;
  return strength_of(p, m, at_label);
}

Noise noise_of(const Parameters& p) {
  Noise noise;
  noise.seed = p.seed;
  noise.offset = p.offset;
  noise.greedy = p.temperature == 0;
  noise.inverse_temperature = noise.greedy ? 1.0 : 1.0 / p.temperature;
  return noise;
}

int draw(std::vector<Scored>& set, const Parameters& p, double total) {
  Best best = Best::none();
  if (p.temperature == 0) {
    for (const Scored& s : set) best.offer(s.z, s.id);
    return best.id;
  }
  size_t kept = set.size();
  const double inverse = 1.0 / p.temperature;
  if (p.has_filters()) {
    std::sort(set.begin(), set.end(), [](const Scored& a, const Scored& b) {
      return a.z != b.z ? a.z > b.z : a.id < b.id;
    });
    if (p.top_k > 0 && static_cast<size_t>(p.top_k) < kept) {
      const double kth = set[p.top_k - 1].z;
      kept = p.top_k;
      while (kept < set.size() && set[kept].z >= kth) ++kept;  // ties with the k-th stay
      total = -1;
    }
    const double top = set[0].z;
    if (total < 0) {
      total = 0;
      for (size_t i = 0; i < kept; ++i) total += std::exp((set[i].z - top) * inverse);
    }
    const double budget = p.top_p >= 1 ? kInf : p.top_p * total;
    const double lowest = std::log(p.min_p);
    double before = 0;
    size_t i = 0;
    for (; i < kept; ++i) {
      const double x = (set[i].z - top) * inverse;
      if (i > 0 && (!(before < budget) || x < lowest)) break;
      before += std::exp(x);
    }
    kept = i;
  }
  for (size_t i = 0; i < kept; ++i) {
    if (set[i].z == -kInf) continue;
    const double uniform = (token_bits(p.seed, p.offset, set[i].id) + 0.5) * 0x1p-32;
    best.offer(set[i].z * inverse - std::log(-std::log(uniform)), set[i].id);
  }
  return best.id;
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

class Selector {
 public:
  Selector(const Row& row, const Sweeps& sweeps, const Constants& context, double top,
           double inverse)
      : row_(row), sweeps_(sweeps), context_(context), top_(top), inverse_(inverse) {}

  void histogram(uint32_t floor_key, int shift, uint32_t prefix) {
    h = Histogram{};
    sweeps_.histogram(row_, 0, row_.vocab, context_, floor_key, shift, prefix, top_, inverse_, h);
  }
  // The exact cut, one sweep for every 11 bits of the key.
  Cut cut(bool by_mass, double target, uint32_t floor_key) {
    Cut c;
    for (int shift : {21, 10, 0}) {
      histogram(floor_key, shift, c.key);
      c.key = (c.key << (shift == 0 ? 10 : 11)) | walk(h, by_mass, target, c);
    }
    return c;
  }
  Histogram h;

 private:
  const Row& row_;
  const Sweeps& sweeps_;
  const Constants& context_;
  double top_, inverse_;
};

}  // namespace

bool select(const Row& row, const Sweeps& sweeps, const Constants& context, const Parameters& p,
            std::vector<Scored>& set, double& total, RowFilter& filter) {
  Best best = Best::none();
  Noise greedy;
  greedy.greedy = true;
  sweeps.sample(row, 0, row.vocab, context, RowFilter(), greedy, nullptr, best);
  const double inverse = 1.0 / p.temperature;
  Selector selector(row, sweeps, context, best.score, inverse);
  selector.histogram(0, 21, 0);
  int64_t tokens = 0;
  double mass = 0;
  for (int b = 0; b < kBins; ++b) {
    tokens += selector.h.count[b];
    mass += selector.h.mass[b];
  }
  const bool use_k = p.top_k > 0 && p.top_k < tokens;
  const double lowest = best.score + std::log(p.min_p) * p.temperature;
  const double most = std::numeric_limits<float>::max();
  const float min_p_floor = static_cast<float>(std::fmin(std::fmax(lowest, -most), most));
  const uint32_t min_p_key = p.min_p > 0 ? ordered_key(min_p_floor) - 1 : 0;

  // The masses are of logits rounded to float, and blurred by that.
  const double blur = std::exp(1e-6 + 2.4e-7 * std::fabs(best.score) * inverse);
  // A superset by whole bins; with top-k it has to hold all of the top-k set, whose mass top-p
  // needs.
  Cut k, m;
  uint32_t floor_key = min_p_key;
  if (use_k) {
    floor_key = walk(selector.h, false, static_cast<double>(p.top_k), k) << 21;
  } else if (p.top_p < 1) {
    floor_key = std::max(floor_key, walk(selector.h, true, p.top_p * mass * blur, m) << 21);
  }
  floor_key = floor_key >> 21 << 21;  // whole bins; draw() looks closer
  int64_t within = 0;
  for (int b = floor_key >> 21; b < kBins; ++b) within += selector.h.count[b];
  if (within <= kCapacity) {
    std::vector<Candidate> items;
    sweeps.gather(row, 0, row.vocab, context, floor_key, items);
    // Where few tokens are left, their masses are taken exactly and only the rest from the
    // histogram.
    double rest = 0;
    for (uint32_t b = 0; b < floor_key >> 21; ++b) rest += selector.h.mass[b];
    bool has_best = false;
    for (const Candidate& c : items) {
      set.push_back({context.steered_logit(c.warm, c.other), c.id});
      has_best |= c.id == best.id;
    }
    if (!has_best) set.push_back({best.score, best.id});  // its float fell below the floor
    total = -1;
    if (!use_k) {
      total = rest;
      for (const Scored& s : set) total += std::exp((s.z - best.score) * inverse);
    }
    return true;
  }

  floor_key = 0;
  if (use_k) {
    const Cut cut = selector.cut(false, static_cast<double>(p.top_k), 0);
    floor_key = cut.key;
    mass = cut.mass_before + cut.tie_mass;
  }
  int last_tie = std::numeric_limits<int>::max();
  if (p.top_p < 1) {
    const Cut cut = selector.cut(true, p.top_p * mass, floor_key);
    floor_key = cut.key;
    const double each = cut.tie_mass / static_cast<double>(cut.tie_count);
    // NaN (0 / 0, inf / inf) where huge logits are rounded far from the exact maximum; then one.
    const double share = std::ceil((p.top_p * mass - cut.mass_before) / each);
    const int64_t ties =
        static_cast<int64_t>(std::fmin(std::fmax(share, 1), static_cast<double>(cut.tie_count)));
    int64_t seen = 0;
    last_tie = sweeps.nth_tie(row, 0, row.vocab, context, cut.key, ties, seen);
  }
  if (min_p_key > floor_key) {
    floor_key = min_p_key;
    last_tie = std::numeric_limits<int>::max();
  }
  filter.best = best.id;
  // Keys below that of -inf, 0 for "no floor" among them, are of NaNs, which nothing exceeds.
  filter.floor =
      key_value(std::max(floor_key, ordered_key(-std::numeric_limits<float>::infinity())));
  filter.last_tie = last_tie;
  return false;
}

}  // namespace svdk
