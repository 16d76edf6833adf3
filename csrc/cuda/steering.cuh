// Steps 1 and 4 to 9 for one row or token: its parameters, constants, the confidence set, the
// direction, the steered logit. The formulas themselves are in csrc/common.h; here is what they
// take, and the same in float for sweeps over the whole row.
#pragma once
#include "../common.h"
#include "arguments.cuh"
#include "platform.cuh"
#include "read.cuh"

namespace svdk::cuda {

// --- Step 1: parameters.

struct RowParameters : Parameters {
  double log_alpha;
  float fast_log_alpha;  // for the first sweep, in whose loop a double would be converted each time
  bool valid;
};

SVDK_DEVICE RowParameters parameters_of(const BatchArgs& a, int row) {
  RowParameters p;
  static_cast<Parameters&>(p) = a.parameters.at(row);
  // The logarithm of the scalar comes from the host.
  p.log_alpha = a.parameters.alpha.rows ? log(p.alpha) : a.log_alpha;
  if (a.direction == kPlain) {  // without a confidence set
    p.alpha = 0;
    p.log_alpha = -kInf;
  }
  p.fast_log_alpha = static_cast<float>(p.log_alpha);
  p.valid = valid_parameters(p, a.vocab);
  return p;
}

// --- What the first sweep finds (steps 2 and 3).

// Beside the status, inside the kernels: warm and base logits so far apart that the rounding of
// their difference shows in the steered logit.
constexpr int kFarApart = 4;
constexpr float kFarApartFrom = 256.0f;

// Tokens that are not two finite logits close to each other: how many have warm = -inf, and which
// kinds there are (Status, kFarApart).
struct Exceptional {
  int warm_masked, flags;

  template <int S>
  SVDK_DEVICE void look_at(float w, float other) {
    const bool warm = w > -kFloatInf;
    if (!(w < kFloatInf)) flags |= kInvalid;
    if (S == kBase && !(other < kFloatInf)) flags |= kInvalid;
    if (S == kVectorRow && !is_finite(other)) flags |= kInvalid;
    if (S == kBase && warm && other == -kFloatInf) flags |= kBaseMasked;
    if (S == kBase && warm && fabsf(w - other) >= kFarApartFrom) flags |= kFarApart;
    if (w == -kFloatInf) ++warm_masked;
  }
};
SVDK_DEVICE Exceptional operator+(Exceptional a, Exceptional b) {
  return {a.warm_masked + b.warm_masked, a.flags | b.flags};
}

// Not finite if an operand is not (or if warm and base logits are far apart: then the product is
// out of range): look closer.
template <int S>
SVDK_DEVICE float nonfinite_probe(float w, float other, float so_far) {
  if (S == kBase) return fmaf(w - other, 0x1p128f / kFarApartFrom, so_far);
  return fmaf(S == kVectorRow ? w + other : w, 0.0f, so_far);
}

// Of the tokens that a thread has seen, and of the whole row.
using RunningSums = SumsOf<Math, float, float>;
struct Sums : SumsOf<Math, float, double> {
  Exceptional exceptional;
};

// --- Steps 4 to 9.

struct Constants : ConstantsOf<Math> {
  int n_inside;       // size of C
  float inside_from;  // C: warm >= inside_from (only set where a sweep needs it)
};

// From the sums of a row; mu and the size of C are set later.
template <int S>
SVDK_DEVICE Constants make_constants(const Sums& sums, const BatchArgs& a, double log_alpha) {
  Constants c;
  static_cast<ConstantsOf<Math>&>(c) =
      svdk::make_constants<Math>(sums, a.direction, log_alpha, a.parameters.penalty, S == kBase);
  c.n_finite = a.vocab - sums.exceptional.warm_masked;
  c.n_inside = c.n_finite;
  c.inside_from = -FLT_MAX;
  return c;
}

// The smallest float inside C: a search over keys, because the test is made in double.
SVDK_DEVICE float inside_from(float max_w, double log_alpha) {
  if (log_alpha < -DBL_MAX) return -FLT_MAX;
  uint32_t low = ordered_key(-FLT_MAX), high = ordered_key(max_w);  // high is inside
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (static_cast<double>(key_value(middle)) - max_w >= log_alpha) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return key_value(high);
}

// The direction at one token of a row, 0 outside C.
template <typename T, int S>
SVDK_DEVICE double delta_at(const Operands<T, S>& row, const Constants& c, int id) {
  const float w = read_one(row.warm, id);
  return c.in_confidence_set(w) ? c.delta_of(w, other_at(row, id)) : 0.0;
}

SVDK_DEVICE double clamped(double x, double limit) { return fmin(fmax(x, -limit), limit); }

// The same arithmetic in float, for sweeps over the whole row. Logits may be as large as a float,
// and mu too, so everything is scaled by powers of two, which costs no precision, until nothing can
// leave the range of a float: logits by kShrink, steered logits (less max_w) by `scale`. Order and
// ties are those of the steered logits themselves.
struct FastConstants {
  static constexpr float kShrink = 0x1p-4f;

  float scaled_strength, from, outside, max_w, max_b, gap, log_zw, scale;
  int direction;
  SVDK_DEVICE explicit FastConstants(const Constants& c)
      : from(c.inside_from),
        max_w(kShrink * c.max_w),
        max_b(kShrink * c.max_b),
        gap(static_cast<float>(kShrink * (c.log_zw - c.log_zb + c.kl))),
        log_zw(static_cast<float>(c.log_zw) * kLog2e),
        direction(c.direction) {
    // Beyond 2^117 the size of mu no longer matters: all that counts is who has the larger delta.
    const double size = clamped(c.mu, 0x1p117);
    scale = scalbnf(1.0f, -9 - ilogb(fmax(fabs(size), 1.0)));
    scaled_strength =
        static_cast<float>(size * scale) * (c.direction == kVector ? 1.0f : 1.0f / kShrink);
    const double shift = c.mu * c.penalty;  // 0 * -inf is NaN
    outside = c.drops_outside() ? -kFloatInf : static_cast<float>(clamped(scale * shift, 0x1p126));
  }

  // The unit of delta_of() in steered logits.
  template <int S>
  SVDK_DEVICE static constexpr double unit() {
    return S == kVectorRow ? 1.0 : 1.0 / kShrink;
  }
  SVDK_DEVICE float shrunk(float w) const { return fmaf(w, kShrink, -max_w); }
  // At a shrunk warm logit.
  SVDK_DEVICE float p_of(float dw) const {
    return exp2_approx(fmaf(dw, kLog2e / kShrink, -log_zw));
  }

  template <int S>
  SVDK_DEVICE float delta_of(float w, float other) const {
    if (S == kNone) return 0.0f;
    if (S == kVectorRow) return other;
    if (other == -kFloatInf) return 0.0f;
    const float dw = shrunk(w), d = dw - fmaf(other, kShrink, -max_b) - gap;
    return direction == kLogRatio ? d : p_of(dw) * d;
  }
  // The steered logit that what moves with mu at a token makes.
  template <int S>
  SVDK_DEVICE float steered_by(float w, float move) const {
    if (S == kNone) return shrunk(w);
    return fmaf(shrunk(w), scale / kShrink, w < from ? outside : scaled_strength * move);
  }
  template <int S>
  SVDK_DEVICE float steered_logit(float w, float other) const {
    if (S == kNone) return shrunk(w);
    return steered_by<S>(w, w < from ? 0.0f : delta_of<S>(w, other));
  }
  // What steered logits are to be multiplied by to be in nats again.
  template <int S>
  SVDK_DEVICE float nats() const {
    return 1.0f / (S == kNone ? kShrink : scale);
  }
};

}  // namespace svdk::cuda
