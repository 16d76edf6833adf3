// What both C++ backends define: enums, parameters of a row, candidates, streaming sums, constants
// of a row and their formulas, moments, partition sums, filters. For host and device, without
// PyTorch.
//
// The steps of a row, numbered alike in every implementation (docs/algorithm.md): 1 validate, 2
// first sweep, 3 merge, 4 constants, 5 confidence set, 6 direction, 7 moments, 8 strength, 9 steer,
// 10 filters, 11 draw, 12 describe. The formulas of 1 and of 4 to 9 are here.
//
// Types that differ in their arithmetic take a `Math`, with exp(float), exp(double) and
// log(double). None initialises its members, because CUDA's shared memory holds them.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "philox.h"

namespace svdk {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kFloatInf = std::numeric_limits<float>::infinity();
constexpr int kMaxId = std::numeric_limits<int>::max();
// Below this a squared norm or variance means: the warm start changed nothing here.
constexpr double kEps = 1e-12;
// Bins of a histogram of steered logits: 11 bits of their ordered key.
constexpr int kBins = 2048;

enum Direction : int { kKlGradient = 0, kLogRatio = 1, kVector = 2, kPlain = 3 };
enum StrengthMode : int { kConstant = 0, kLabel = 1, kKlBudget = 2 };
enum Status : int { kOk = 0, kInvalid = 1, kBaseMasked = 2 };
enum class DType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

SVDK_HD bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }
SVDK_HD bool is_finite(double x) { return fabs(x) <= DBL_MAX; }
SVDK_HD bool in_unit(double x) { return x >= 0 && x <= 1; }

// A scalar or one a row.
template <typename T, typename R>
struct PerRow {
  T scalar;
  const R* rows;  // or null
  SVDK_HD T at(int64_t row) const { return rows ? static_cast<T>(rows[row]) : scalar; }
};
using Real = PerRow<double, float>;
using Integer = PerRow<int64_t, int64_t>;

// The parameters of one row, in the order of the table in svdk/ops/schema.py. (The direction
// belongs to the rows of a call: it says what their second operand is.)
struct Parameters {
  int64_t label;
  int mode;
  double strength, alpha, penalty, temperature;
  int64_t top_k;
  double top_p, min_p;
  uint64_t seed, offset;

  SVDK_HD bool greedy() const { return temperature == 0; }
  SVDK_HD bool has_filters() const {
    return temperature > 0 && (top_k > 0 || top_p < 1 || min_p > 0);
  }
};

// Those of a call.
struct BatchParameters {
  Integer labels;
  int mode;
  Real strength, alpha;
  double penalty;
  Real temperature;
  Integer top_k;
  Real top_p, min_p;
  Integer seed, offset;

  SVDK_HD Parameters at(int64_t row) const {
    return {labels.at(row),
            mode,
            strength.at(row),
            alpha.at(row),
            penalty,
            temperature.at(row),
            top_k.at(row),
            top_p.at(row),
            min_p.at(row),
            static_cast<uint64_t>(seed.at(row)),
            static_cast<uint64_t>(offset.at(row))};
  }
};

// Step 1, of the parameters: only those that come as tensors get this far unchecked.
SVDK_HD bool valid_parameters(const Parameters& p, int vocab) {
  const bool label = p.mode != kLabel || (p.label >= 0 && p.label < vocab);
  return label && is_finite(p.strength) && (p.mode != kKlBudget || p.strength >= 0) &&
         in_unit(p.alpha) && is_finite(p.temperature) && p.temperature >= 0 && p.top_k >= 0 &&
         in_unit(p.top_p) && in_unit(p.min_p);
}

// A token that may be in the confidence set.
struct Candidate {
  int32_t id;
  float warm, other;  // other: base logit or vector entry
};

SVDK_HD uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}
SVDK_HD float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Order-preserving map from float to unsigned; both zeros are one value.
SVDK_HD uint32_t ordered_key(float x) {
  const uint32_t bits = float_bits(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
SVDK_HD float key_value(uint32_t key) {
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The nearest bfloat16, ties to even; of a finite number the nearest finite one.
SVDK_HD uint16_t float_to_bfloat16(float x) {
  if (x != x) return 0x7fc0u;
  const uint32_t bits = float_bits(x), sign = bits & 0x80000000u;
  const uint32_t largest = is_finite(x) ? 0x7f7f0000u : 0x7f800000u;
  const uint32_t rounded = (bits ^ sign) + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((sign | (rounded < largest ? rounded : largest)) >> 16);
}

// Likewise the nearest half.
SVDK_HD uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x), sign = bits & 0x80000000u, size = bits ^ sign;
  const uint32_t to_sign = sign >> 16, largest = is_finite(x) ? 0x7bffu : 0x7c00u;
  uint32_t rounded = 0x7e00u;  // NaN
  if (x == x && size < 0x38800000u) {
    // Below 2^-14: a multiple of 2^-24, which is what this sum rounds to.
    rounded = float_bits(bits_float(size) + 0.5f) - 0x3f000000u;
  } else if (x == x) {
    rounded = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    if (rounded > largest) rounded = largest;
  }
  return static_cast<uint16_t>(to_sign | rounded);
}

// The best of the tokens offered: the largest score, then the lowest id. -1 is nobody.
struct Best {
  double score;
  int id;
  SVDK_HD static Best none() { return {-kInf, -1}; }
  SVDK_HD void offer(double s, int token) {
    if (s > score || (s == score && (id < 0 || token < id))) {
      score = s;
      id = token;
    }
  }
};

// Which tokens a draw from the whole row may yield: those whose steered logit (as float) is above
// `floor`, and of those equal to it the ones with an id up to `last_tie`.
struct Filter {
  float floor;
  int last_tie;
  SVDK_HD static Filter none() { return {-kFloatInf, kMaxId}; }
  SVDK_HD bool filters() const { return floor > -kFloatInf; }
  SVDK_HD bool keeps(float z, int id) const { return z > floor || (z == floor && id <= last_tie); }
};

// Steps 2 and 3: streaming sums over the tokens seen so far, relative to the running maxima.
template <typename Math, typename Max, typename Sum>
struct SumsOf {
  Max max_w, max_b;
  Sum z_w, z_b;  // sum exp(warm - max_w), sum exp(base - max_b)
  Sum usable;    // the part of z_w whose base logit is finite
  Sum cross;     // sum over it of exp(w - max_w) * ((w - max_w) - (b - max_b))

  SVDK_HD void clear() {
    max_w = max_b = static_cast<Max>(-kInf);
    z_w = z_b = usable = cross = 0;
  }
  SVDK_HD void rescale(Max new_w, Max new_b) {
    const Max none = static_cast<Max>(-kInf), zero = 0;
    const Max keep = max_w == none ? zero : Math::exp(max_w - new_w);
    if (usable != 0) {
      const Sum moved = cross + usable * ((max_w - new_w) - (max_b - new_b));
      cross = keep > 0 ? keep * moved : 0;
    }
    z_w *= keep;
    usable *= keep;
    if (max_b != new_b) z_b *= max_b == none ? zero : Math::exp(max_b - new_b);
    max_w = new_w;
    max_b = new_b;
  }
};

// K = KL(p || q), over the tokens with a finite base logit: sum p (log p - log q).
template <typename Sums>
SVDK_HD double kl_divergence(const Sums& sums, double log_zw, double log_zb) {
  return sums.usable > 0 ? (sums.cross + sums.usable * (log_zb - log_zw)) / sums.z_w : 0.0;
}

// Step 4: what the formulas of a row need once its sums are known, and these formulas.
template <typename Math>
struct ConstantsOf {
  int direction, n_finite;  // n_finite: tokens with a finite warm logit
  float max_w, max_b;
  // log_zw, log_zb: of sum exp(x - max). A log-sum-exp in one number would round them away next to
  // a maximum of 1e16 and more.
  double log_zw, log_zb, kl, log_alpha, mu, penalty;

  SVDK_HD double log_p_of(float w) const { return (static_cast<double>(w) - max_w) - log_zw; }
  SVDK_HD double log_q_of(float b) const {
    return b == -kFloatInf ? -kInf : (static_cast<double>(b) - max_b) - log_zb;
  }
  // Step 5.
  SVDK_HD bool in_confidence_set(float w) const {
    return w != -kFloatInf && static_cast<double>(w) - max_w >= log_alpha;
  }
  // Step 6, of a token in the confidence set. (Outside it the direction is 0.)
  SVDK_HD double delta_of(float w, float other) const {
    if (direction == kPlain) return 0;
    if (direction == kVector) return other;
    if (other == -kFloatInf || w == -kFloatInf) return 0;
    const double log_p = log_p_of(w), d = log_p - log_q_of(other) - kl;
    return direction == kLogRatio ? d : Math::exp(log_p) * d;
  }
  // A penalty of -inf: tokens outside the confidence set cannot be drawn.
  SVDK_HD bool drops_outside() const { return penalty == -kInf; }
  // Step 9, at a strength of its own, or at that of the row.
  SVDK_HD double steered_logit(double strength, float w, float other) const {
    if (w == -kFloatInf) return -kInf;
    if (in_confidence_set(w)) return w + strength * delta_of(w, other);
    return drops_outside() ? -kInf : w + strength * penalty;
  }
  SVDK_HD double steered_logit(float w, float other) const { return steered_logit(mu, w, other); }
};

// The constants that follow from the sums; mu and n_finite are set by the caller.
template <typename Math, typename Sums>
SVDK_HD ConstantsOf<Math> make_constants(const Sums& sums, int direction, double log_alpha,
                                         double penalty, bool has_base) {
  ConstantsOf<Math> c;
  c.direction = direction;
  c.n_finite = 0;
  c.max_w = static_cast<float>(sums.max_w);
  c.max_b = 0;
  c.log_zw = Math::log(sums.z_w);
  c.log_zb = c.kl = c.mu = 0;
  c.log_alpha = log_alpha;
  c.penalty = penalty;
  if (has_base && static_cast<float>(sums.max_b) != -kFloatInf) {
    c.max_b = static_cast<float>(sums.max_b);
    c.log_zb = Math::log(sums.z_b);
    c.kl = kl_divergence(sums, c.log_zw, c.log_zb);
  }
  return c;
}

// Of delta (0 outside the confidence set): sum p delta, Var_p(delta), ||delta||^2.
struct Moments {
  double mean, variance, norm2;
};

// Step 7: sums over the confidence set of p, p d, p d^2 with d = delta - pivot, and of delta^2. The
// pivot is a vector's entry at the likeliest token, else 0: about 0, the variance of a vector with
// a common offset, or in a confident row, would be lost in rounding.
struct MomentSums {
  double mass, first, second, norm2;

  SVDK_HD static MomentSums none() { return {0, 0, 0, 0}; }
  SVDK_HD void add(double p, double delta, double pivot) {
    const double d = delta - pivot;
    mass += p;
    first += p * d;
    second += p * d * d;
    norm2 += delta * delta;
  }
  // `outside`: the mass of the tokens outside the confidence set, whose delta is 0.
  SVDK_HD Moments moments(double pivot, double outside, double total) const {
    const double m = (first - outside * pivot) / total;
    const double variance = fmax((second + outside * pivot * pivot) / total - m * m, 0.0);
    return {pivot + m, variance, norm2};
  }
};

// Step 8: mu from the mode, the moments and the direction at the label (0 outside the confidence
// set).
SVDK_HD double strength_of(const Parameters& p, const Moments& m, double delta_of_label) {
  if (p.mode == kConstant) return p.strength;
  if (p.mode == kKlBudget) return m.variance < kEps ? 0.0 : sqrt(2 * p.strength / m.variance);
  return m.norm2 < kEps ? 0.0 : (delta_of_label - m.mean) / (m.norm2 + kEps);
}

// Along mu: sums of e = exp(steered logit - max), and of e (m - pivot) and e (m - pivot)^2 of what
// moves with mu, m (delta, or the penalty outside the confidence set). The pivot is that of the
// largest steered logit so far.
template <typename Math, typename Max>
struct PartitionOf {
  Max max, pivot;
  double z, first, second;

  SVDK_HD void clear() {
    max = static_cast<Max>(-kInf);
    pivot = 0;
    z = first = second = 0;
  }
  // `unit`: of max, in nats.
  SVDK_HD void rescale(Max new_max, Max new_pivot, Max unit = 1) {
    const double keep = max == static_cast<Max>(-kInf)
                            ? 0.0
                            : static_cast<double>(Math::exp((max - new_max) * unit));
    const double d = static_cast<double>(pivot) - new_pivot;
    if (keep != 0) {  // else nothing is left, and d squared might be infinite
      second = keep * (second + 2 * d * first + d * d * z);
      first = keep * (first + d * z);
    } else {
      first = second = 0;
    }
    z *= keep;
    max = new_max;
    pivot = new_pivot;
  }
  SVDK_HD void add(double e, double moves) {
    const double d = moves - pivot;
    z += e;
    first += e * d;
    second += e * d * d;
  }
  SVDK_HD double mean() const { return pivot + first / z; }
  SVDK_HD double variance() const {
    const double m = first / z;
    return fmax(second / z - m * m, 0.0);
  }
};

}  // namespace svdk
