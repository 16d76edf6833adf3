// Steps 1, 3 to 6, 8 and 9 for single tokens: the logits of a row, its sums and constants, what the
// formulas of common.h make of them. No PyTorch here or below: the kernels are plain C++ over
// pointers.
#pragma once
#include <cmath>
#include <cstring>

#include "../common.h"

namespace svdk {

// std::exp and std::log, as the formulas of common.h take them.
struct Math {
  static double exp(double x) { return std::exp(x); }
  static double log(double x) { return std::log(x); }
};

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, exponent = (x >> 10) & 31, fraction = x & 1023;
  uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  if (exponent == 31) bits = sign | 0x7f800000u | (fraction << 13);
  float f;
  std::memcpy(&f, &bits, sizeof f);
  if (exponent == 0) f = (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  return f;
}

// One row: the warm logits and what they are compared with (base logits, a vector, or nothing).
struct RowLogits {
  const void* warm;
  const void* base;     // same dtype as warm, or null
  const float* vector;  // or null
  DType dtype;
  int vocab, direction;
  const float* bias = nullptr;        // added to warm and base logits, or null
  const uint32_t* allowed = nullptr;  // a bit a token, or null: where it is 0 they are -inf

  bool adjusts() const { return bias || allowed; }
  bool allows(int id) const { return !allowed || (allowed[id / 32] >> (id % 32) & 1); }
  // A warm or base logit as it counts. The sum is that of floats in every backend.
  float adjusted(float x, int id) const {
    if (bias) x += bias[id];
    return allows(id) ? x : -kFloatInf;
  }

  float logit(const void* source, int id) const {
    if (dtype == DType::kFloat) return static_cast<const float*>(source)[id];
    const uint16_t x = static_cast<const uint16_t*>(source)[id];
    return dtype == DType::kBFloat16 ? bfloat16_to_float(x) : half_to_float(x);
  }
  float warm_at(int id) const { return adjusted(logit(warm, id), id); }
  float other_at(int id) const {
    return base ? adjusted(logit(base, id), id) : vector ? vector[id] : 0.0f;
  }
};

// Of a row, or of a slice of one.
struct Sums : SumsOf<Math, double, double> {
  int64_t n_finite = 0;       // tokens with a finite warm logit
  bool invalid = false;       // NaN or +inf seen
  bool base_masked = false;   // a token with finite warm and -inf base seen
  bool beyond_float = false;  // a finite value seen next to which others would be rounded away

  Sums() { clear(); }
  void merge(Sums slice) {
    const double w = std::fmax(max_w, slice.max_w), b = std::fmax(max_b, slice.max_b);
    rescale(w, b);
    slice.rescale(w, b);
    z_w += slice.z_w;
    z_b += slice.z_b;
    usable += slice.usable;
    cross += slice.cross;
    n_finite += slice.n_finite;
    invalid |= slice.invalid;
    base_masked |= slice.base_masked;
    beyond_float |= slice.beyond_float;
  }
  // Whether the row can be sampled.
  bool valid() const { return !invalid && max_w != -kInf; }
  // Whether a log-ratio without the maxima and K is off by more than a constant.
  bool needs_maxima() const { return base_masked || beyond_float; }
  int status() const { return base_masked ? kBaseMasked : kOk; }
};

struct Constants : ConstantsOf<Math> {
  double pivot = 0;  // of the moments

  Constants() : ConstantsOf<Math>{kPlain, 0, 0, 0, 0, 0, 0, -kInf, 0, -kInf} {}
  explicit Constants(const ConstantsOf<Math>& x) : ConstantsOf<Math>(x) {}
};

inline double log_alpha_of(int direction, double alpha) {
  return direction == kPlain ? -kInf : std::log(alpha);
}

// mu is set later.
inline Constants make_constants(const RowLogits& row, const Parameters& p, const Sums& sums) {
  Constants c(make_constants<Math>(sums, row.direction, log_alpha_of(row.direction, p.alpha),
                                   p.penalty, row.base != nullptr));
  c.n_finite = static_cast<int>(sums.n_finite);
  return c;
}

// The direction at one token, 0 outside the confidence set.
inline double delta_at(const RowLogits& row, const Constants& c, int id) {
  const float w = row.warm_at(id);
  return c.in_confidence_set(w) ? c.delta_of(w, row.other_at(id)) : 0.0;
}

// mu of a row.
inline double strength_of(const RowLogits& row, const Parameters& p, const Constants& c,
                          const Moments& m) {
  const bool at_label = p.mode == kLabel;
  return strength_of(p, m, at_label ? delta_at(row, c, static_cast<int>(p.label)) : 0.0);
}

// The token of a row that cannot be sampled: argmax over its finite warm logits, 0 if there is
// none.
inline int fallback_token(const RowLogits& row) {
  float best = -kFloatInf;
  int token = 0;
  for (int i = 0; i < row.vocab; ++i) {
    const float w = row.warm_at(i);
    if (is_finite(w) && w > best) {
      best = w;
      token = i;
    }
  }
  return token;
}

}  // namespace svdk
