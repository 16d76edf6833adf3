// 4 floats a vector in the compiler's own vector types: SSE2, NEON or whatever the target has.
// Included inside the architecture's own namespace.
struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  static constexpr int N = 4;
  static constexpr bool kScaleSaturates = false;  // scale() takes any exponent, and NaN

  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F set(float x) { return F{x, x, x, x}; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F fraction(F t) {
    const F magic = set(12582912.0f);  // 1.5 * 2^23: adding it leaves only the integer part
    return t - ((t - 0.5f + magic) - magic);
  }
  static F scale(F x, F t, F f) {  // x * 2^(t - f)
    const U e = ((U) __builtin_convertvector(t - f, Mask) + 127u) << 23;
    return x * (F)e;
  }
  static Mask ge(F a, F b) { return a >= b; }
  static F select(Mask m, F yes, F no) { return m ? yes : no; }
  static uint32_t bits(Mask m) { return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u); }
  static Mask mask(uint32_t bits) {  // of the lowest N bits
    const U each = {1, 2, 4, 8};
    return (Mask)((each & bits) != 0);
  }
  static Mask both(Mask a, Mask b) { return a & b; }
  static float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
  static float top(F x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }

  static F load_bf16(const uint16_t* p) {
    const U x = {p[0], p[1], p[2], p[3]};
    return (F)(x << 16);
  }
  static F load_half(const uint16_t* p) {
    return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }
};
