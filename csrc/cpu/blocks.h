// Arithmetic on blocks of at most kBlock floats that lie in L1. Included inside an architecture's
// namespace after its Vec. Blocks are padded with -inf up to kPad, so loops have no tails.

constexpr int kPad = 32;  // tokens of two vectors, which loops take at a time
// Above this the float loops could overflow (they sum squares of differences): double does it.
constexpr float kFloatSafe = 1e15f;

inline int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

// 2^t for t <= 127 as 2^n * 2^f, f by a polynomial of degree 5 with a relative error of 1.7e-7 in
// float. Below -126 it loses digits and at -127 it is 0, which matters to whoever multiplies it by
// more than 1e30 (logits masked with the lowest float): t is clamped there, or the hardware's
// scaling goes on below that (there it is 0 from -151 down). NaN gives NaN.
template <bool kClamp = true>
inline Vec::F exp2(Vec::F t) {
  using V = Vec;
  if (kClamp || !V::kScaleSaturates) {
    t = V::max(V::set(V::kScaleSaturates ? -151.0f : -127.0f), t);
  }
  V::F n;
  const V::F f = V::fraction(t, n);
  V::F y = V::set(V::kPower[5]);
  for (int k = 4; k >= 0; --k) y = V::fma(y, f, V::set(V::kPower[k]));
  return V::scale(y, n);
}

constexpr float kLog2E = 1.44269504088896341f;

// exp(x) for x <= 88. The rounding of x log2(e) adds |x| * 6e-8, which matters only where the
// result itself is negligible.
template <bool kClamp = true>
inline Vec::F exp(Vec::F x) {
  return exp2<kClamp>(x * Vec::set(kLog2E));
}

// exp(x rate) is exp2(x times this); finite, so that 0 times it is 0.
inline Vec::F base2(float rate) { return Vec::set(std::min(rate * kLog2E, FLT_MAX)); }

// The float from which on vector loops look for what is at least a bound; never -inf.
inline float below(double bound) {
  return std::max(-FLT_MAX, std::nextafter(static_cast<float>(bound), -kFloatInf));
}

// A block of one operand: where its floats are, its maximum and size, and whether all are finite.
struct Block {
  const float* data;
  float top;        // maximum
  float magnitude;  // an upper bound of |x|; only if finite
  bool finite;      // no -inf, NaN, +inf, nor anything above kFloatSafe
};

// Floats of tokens [begin, begin + n): in place where fp32 needs no padding, else in space.
inline const float* fetch(const void* source, DType dtype, int begin, int n, float* space) {
  if (dtype == DType::kFloat) {
    const float* p = static_cast<const float*>(source) + begin;
    if (n % kPad == 0) return p;
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

// Maximum, size and finiteness of n floats (a multiple of kPad); the sum of squares is NaN or above
// kFloatSafe^2 when something is not finite or beyond kFloatSafe, which the slow paths handle.
inline Block scan(const float* x, int n, int real, int ahead = 0) {
  Vec::F top0 = Vec::load(x), top1 = top0, low = top0;
  Vec::F square0 = Vec::set(0.0f), square1 = square0;
  for (int i = 0; i < n; i += 2 * Vec::N) {
    __builtin_prefetch(x + i + ahead);
    const Vec::F a = Vec::load(x + i), b = Vec::load(x + i + Vec::N);
    top0 = Vec::max(top0, a);
    top1 = Vec::max(top1, b);
    low = Vec::min(low, Vec::min(a, b));
    square0 = Vec::fma(a, a, square0);
    square1 = Vec::fma(b, b, square1);
  }
  Block block{x, Vec::top(Vec::max(top0, top1)), 0.0f, true};
  float square = Vec::sum(square0 + square1);
  block.magnitude = std::max(std::fabs(block.top), Vec::top(Vec::set(0.0f) - low));
  if (n != real) {  // the -inf padding spoils both: once a row
    square = 0.0f;
    for (int i = 0; i < real; ++i) square += x[i] * x[i];
    block.magnitude = std::sqrt(square);
  }
  block.finite = square < kFloatSafe * kFloatSafe;
  return block;
}

// Sum of exp((x - top) rate) over n floats, a multiple of kPad.
inline float sum_exp(const float* x, int n, float top, float rate) {
  const Vec::F shift = Vec::set(top), by = base2(rate);
  Vec::F a = Vec::set(0.0f), b = a;
  for (int i = 0; i < n; i += 2 * Vec::N) {
    a = a + exp2((Vec::load(x + i) - shift) * by);
    b = b + exp2((Vec::load(x + i + Vec::N) - shift) * by);
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
inline BlockSums block_sums(const float* w, const float* b, int n, float max_w, float max_b,
                            int ahead = 0) {
  using V = Vec;
  const V::F shift_w = V::set(max_w), shift_b = V::set(max_b), zero = V::set(0.0f);
  const V::F lowest = V::set(-FLT_MAX);
  // One accumulator each: with more, the constants of exp() would leave the registers.
  V::F z_w = zero, z_b = zero, u = zero, cross = zero, top_w = lowest, top_b = lowest;
  for (int i = 0; i < n; i += 2 * V::N) {
    __builtin_prefetch(w + i + ahead);
    __builtin_prefetch(b + i + ahead);
    for (int at = i; at < i + 2 * V::N; at += V::N) {
      const V::F x = V::load(w + at), y = V::load(b + at);
      const V::F dx = x - shift_w, dy = y - shift_b;
      V::F ex = exp<kMinusInf>(dx), ey = exp<kMinusInf>(dy), d = dx - dy;
      if (kMinusInf) {
        const V::Mask has_w = V::ge(x, lowest), has_b = V::ge(y, lowest);
        const V::Mask ok = V::both(has_w, has_b);
        ex = V::select(has_w, ex, zero);
        ey = V::select(has_b, ey, zero);
        d = V::select(ok, d, zero);
        u = u + V::select(ok, ex, zero);
      } else {
        top_w = V::max(top_w, x);
        top_b = V::max(top_b, y);
      }
      z_w = z_w + ex;
      z_b = z_b + ey;
      cross = V::fma(ex, d, cross);
    }
  }
  const float total = V::sum(z_w);
  return {total,         V::sum(z_b),   kMinusInf ? V::sum(u) : total,
          V::sum(cross), V::top(top_w), V::top(top_b)};
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
