// Arithmetic on blocks of at most kBlock floats that lie in L1. Included inside an architecture's
// namespace after its Vec. Blocks are padded with -inf up to kPad, so loops have no tails.

constexpr int kPad = 32;  // tokens of two vectors, which loops take at a time
// Above this the float loops could overflow (they sum squares of differences): double does it.
constexpr float kFloatSafe = 1e15f;

inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

// exp(x) for x <= 88 as 2^floor(t) * 2^fraction, t = x log2(e). The polynomial is the degree-5
// minimax fit of 2^f on [0, 1], relative error 1.5e-7 in float; the rounding of t adds |x| * 6e-8,
// which matters only where the result itself is negligible. Below -87.4 it is 0, which matters to
// whoever multiplies it by more than 1e30 (logits masked with the lowest float): because t is
// clamped to where the exponent's bits are all 0, or by the scaling of the hardware, which goes on
// below that (there it is 0 from -104 down). NaN gives NaN, or 0 where t is clamped.
template <bool kClamp = true>
inline Vec::F exp(Vec::F x) {
  using V = Vec;
  V::F t = x * V::set(1.44269504088896341f);
  if (kClamp || !V::kScaleSaturates) {
    t = V::max(t, V::set(V::kScaleSaturates ? -151.0f : -126.75f));
  }
  const V::F f = V::fraction(t);
  V::F y = V::set(1.8775767e-3f);
  y = V::fma(y, f, V::set(8.989341e-3f));
  y = V::fma(y, f, V::set(5.5826318e-2f));
  y = V::fma(y, f, V::set(2.4015361e-1f));
  y = V::fma(y, f, V::set(6.931531e-1f));
  y = V::fma(y, f, V::set(9.9999994e-1f));
  return V::scale(y, t, f);
}

// A block of one operand: where its floats are, its maximum and size, and whether all are finite.
struct Block {
  const float* data;
  float top;        // maximum
  float magnitude;  // an upper bound of |x|; only if finite
  bool finite;      // no -inf, NaN, +inf, nor anything above kFloatSafe
};

// Floats of tokens [begin, begin + n): in place for whole fp32 blocks, else converted into space.
inline const float* fetch(const void* source, DType dtype, int begin, int n, float* space) {
  if (dtype == DType::kFloat) {
    const float* p = static_cast<const float*>(source) + begin;
    if (n == kBlock) return p;
    std::memcpy(space, p, n * sizeof(float));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(source) + begin;
    int i = 0;
    if (dtype == DType::kBFloat16) {
      for (; i + Vec::N <= n; i += Vec::N) Vec::store(space + i, Vec::load_bf16(p + i));
      for (; i < n; ++i) space[i] = bfloat16_to_float(p[i]);
    } else {
      for (; i + Vec::N <= n; i += Vec::N) Vec::store(space + i, Vec::load_half(p + i));
      for (; i < n; ++i) space[i] = half_to_float(p[i]);
    }
  }
  for (int i = n; i < padded(n); ++i) space[i] = -kFloatInf;
  return space;
}

// Whether the mask of a row takes out all of the tokens [begin, begin + n).
inline bool none_allowed(const RowLogits& row, int begin, int n) {
  if (!row.allowed) return false;
  const uint32_t* words = row.allowed + begin / 32;
  uint32_t any = 0;
  for (int i = 0; i < n / 32; ++i) any |= words[i];
  if (n % 32) any |= words[n / 32] & ((1u << n % 32) - 1);
  return any == 0;
}

// Bias and mask of a row for the logits x of tokens [begin, begin + n), begin a multiple of 32;
// into space, where x may be already.
inline const float* adjust(const RowLogits& row, int begin, int n, const float* x, float* space) {
  const Vec::F gone = Vec::set(-kFloatInf);
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint32_t word = row.allowed ? row.allowed[(begin + i) / 32] : ~0u;
    for (int k = 0; k < 32; k += Vec::N) {
      Vec::F y = Vec::load(x + i + k);
      if (row.bias) y = y + Vec::load(row.bias + begin + i + k);
      Vec::store(space + i + k, Vec::select(Vec::mask(word >> k), y, gone));
    }
  }
  for (; i < n; ++i) space[i] = row.adjusted(x[i], begin + i);
  return space;
}

// Warm or base logits as fetch() gives them, with bias and mask.
inline const float* fetch_logits(const RowLogits& row, const void* source, int begin, int n,
                                 float* space) {
  const float* x = fetch(source, row.dtype, begin, n, space);
  return row.adjusts() ? adjust(row, begin, n, x, space) : x;
}

// Maximum and finiteness of n floats (a multiple of kPad); the sum of squares is NaN or above
// kFloatSafe^2 when something is not finite or beyond kFloatSafe, which the slow paths handle.
inline Block scan(const float* x, int n, int real) {
  Vec::F top0 = Vec::load(x), top1 = top0, square0 = Vec::set(0.0f), square1 = square0;
  for (int i = 0; i < n; i += 2 * Vec::N) {
    const Vec::F a = Vec::load(x + i), b = Vec::load(x + i + Vec::N);
    top0 = Vec::max(top0, a);
    top1 = Vec::max(top1, b);
    square0 = Vec::fma(a, a, square0);
    square1 = Vec::fma(b, b, square1);
  }
  Block block{x, Vec::top(Vec::max(top0, top1)), 0.0f, true};
  float square = Vec::sum(square0 + square1);
  if (n != real) {  // the -inf padding spoils the sum: once a row
    square = 0.0f;
    for (int i = 0; i < real; ++i) square += x[i] * x[i];
  }
  block.finite = square < kFloatSafe * kFloatSafe;
  block.magnitude = std::sqrt(square);
  return block;
}

// Sum of exp((x - top) rate) over n floats, a multiple of kPad.
inline float sum_exp(const float* x, int n, float top, float rate) {
  const Vec::F shift = Vec::set(top), by = Vec::set(rate);
  Vec::F a = Vec::set(0.0f), b = a;
  for (int i = 0; i < n; i += 2 * Vec::N) {
    a = a + exp((Vec::load(x + i) - shift) * by);
    b = b + exp((Vec::load(x + i + Vec::N) - shift) * by);
  }
  return Vec::sum(a + b);
}

struct BlockSums {
  float z_w, z_b, usable, cross;
  float top_w, top_b;  // maxima, only without kMinusInf
};

// The sums of common.h over one block, relative to max_w and max_b, which need not be the maxima.
// With kMinusInf, -inf may occur in either operand; without it, anything not finite makes cross,
// z_w or z_b not finite, so that the caller needs no look at the operands beforehand.
template <bool kMinusInf>
inline BlockSums block_sums(const float* w, const float* b, int n, float max_w, float max_b) {
  using V = Vec;
  const V::F shift_w = V::set(max_w), shift_b = V::set(max_b), zero = V::set(0.0f);
  const V::F lowest = V::set(-FLT_MAX);
  V::F z_w[2] = {zero, zero}, z_b[2] = {zero, zero}, u[2] = {zero, zero}, cross[2] = {zero, zero};
  V::F top_w[2] = {lowest, lowest}, top_b[2] = {lowest, lowest};
  for (int i = 0; i < n; i += 2 * V::N) {
    for (int k = 0; k < 2; ++k) {
      const V::F x = V::load(w + i + k * V::N), y = V::load(b + i + k * V::N);
      const V::F dx = x - shift_w, dy = y - shift_b;
      V::F ex = exp<kMinusInf>(dx), ey = exp<kMinusInf>(dy), d = dx - dy;
      if (kMinusInf) {
        const V::Mask has_w = V::ge(x, lowest), has_b = V::ge(y, lowest);
        const V::Mask ok = V::both(has_w, has_b);
        ex = V::select(has_w, ex, zero);
        ey = V::select(has_b, ey, zero);
        d = V::select(ok, d, zero);
        u[k] = u[k] + V::select(ok, ex, zero);
      } else {
        top_w[k] = V::max(top_w[k], x);
        top_b[k] = V::max(top_b[k], y);
      }
      z_w[k] = z_w[k] + ex;
      z_b[k] = z_b[k] + ey;
      cross[k] = V::fma(ex, d, cross[k]);
    }
  }
  const float total = V::sum(z_w[0] + z_w[1]);
  return {total,
          V::sum(z_b[0] + z_b[1]),
          kMinusInf ? V::sum(u[0] + u[1]) : total,
          V::sum(cross[0] + cross[1]),
          V::top(V::max(top_w[0], top_w[1])),
          V::top(V::max(top_b[0], top_b[1]))};
}

// What a block with NaN, infinities or values beyond kFloatSafe holds; the vector loops leave these
// to here.
struct Exceptional {
  bool any = false, invalid = false, base_masked = false, beyond_float = false;
  int n_finite = 0;  // tokens with a finite warm logit, if any
};

inline Exceptional classify(const float* w, const float* other, int n, bool other_is_vector) {
  Exceptional found;
  found.any = true;
  const float inf = kFloatInf;
  for (int i = 0; i < n; ++i) {
    found.invalid |= !(w[i] < inf);
    found.n_finite += w[i] > -inf;
    found.beyond_float |= w[i] > -inf && std::fabs(w[i]) > kFloatSafe;
    if (other) {
      found.invalid |= !(other[i] < inf) || (other_is_vector && other[i] == -inf);
      found.beyond_float |= other[i] > -inf && std::fabs(other[i]) > kFloatSafe;
      found.base_masked |= !other_is_vector && w[i] > -inf && other[i] == -inf;
    }
  }
  return found;
}

// Constants of steered logits in float, for the vector filter in front of the exact arithmetic.
struct FloatConstants {
  float mu, inside_from, outside_shift, max_w, log_zw, max_b, log_zb, kl;
  bool drop_outside;
  bool beyond_float;  // a constant that float differences cannot do without overflow
  explicit FloatConstants(const Constants& c)
      : mu(static_cast<float>(c.mu)),
        inside_from(static_cast<float>(c.max_w + c.log_alpha)),
        outside_shift(c.penalty == -kInf ? 0.0f : static_cast<float>(c.mu * c.penalty)),
        max_w(static_cast<float>(c.max_w)),
        log_zw(static_cast<float>(c.log_zw)),
        max_b(static_cast<float>(c.max_b)),
        log_zb(static_cast<float>(c.log_zb)),
        kl(static_cast<float>(c.kl)),
        drop_outside(c.penalty == -kInf),
        beyond_float(std::fabs(c.max_w) > kFloatSafe || std::fabs(c.max_b) > kFloatSafe ||
                     std::fabs(c.kl) > kFloatSafe || std::fabs(c.pivot) > kFloatSafe) {}
};

// delta of a block in float; `other` holds base logits or the vector. All finite.
template <int kDirection>
inline void delta_block(const float* w, const float* other, int n, const FloatConstants& c,
                        float* out) {
  using V = Vec;
  const V::F max_w = V::set(c.max_w), log_zw = V::set(c.log_zw);
  const V::F max_b = V::set(c.max_b), shift = V::set(c.log_zb - c.kl);
  for (int i = 0; i < n; i += V::N) {
    const V::F x = (V::load(w + i) - max_w) - log_zw;
    const V::F d = x - ((V::load(other + i) - max_b) - shift);
    V::store(out + i, kDirection == kLogRatio ? d : exp(x) * d);
  }
}
