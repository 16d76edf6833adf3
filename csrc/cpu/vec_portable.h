// 4 floats a vector in the compiler's own vector types: SSE2, NEON or whatever the target has.
// Included inside the architecture's own namespace.
struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  static constexpr int N = 4;
  static constexpr bool kScaleSaturates = false;  // scale() takes any exponent, and NaN
  // Of 2^f on [-1/2, 1/2], the minimax fit whose value at 0 is 1.
  static constexpr float kPower[] = {1.0f,          6.931470e-1f, 2.4022242e-1f,
                                     5.5507336e-2f, 9.671513e-3f, 1.3264727e-3f};

  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F set(float x) { return F{x, x, x, x}; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  // t less the nearest integer, and n as scale() takes it: that integer + 127 in its lowest bits.
  static F fraction(F t, F& n) {
    const F magic = set(12583039.0f);  // 1.5 * 2^23 + 127
    n = t + magic;
    return t - (n - magic);
  }
  static F scale(F x, F n) { return x * (F)((U)n << 23); }  // for -127 (0 is the result) to 127
  static Mask ge(F a, F b) { return a >= b; }
  static F select(Mask m, F yes, F no) { return m ? yes : no; }
  static uint32_t bits(Mask m) { return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u); }
  // The floats whose bits are set, in order, at the front.
  static F squeeze(F x, uint32_t bits) {
    F front = x;
    int place = 0;
    for (int i = 0; i < N; ++i) {
      if ((bits >> i) & 1) front[place++] = x[i];
    }
    return front;
  }
  // Integers i, i + 1, ..., as the bits of floats.
  static F count_up(int i) { return (F)(Mask{i, i + 1, i + 2, i + 3}); }
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
