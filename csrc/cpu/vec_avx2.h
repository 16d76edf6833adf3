// AVX2 + FMA + F16C: 8 floats a vector. Included inside the architecture's own namespace.

// For every mask, a byte a place: which float goes there.
struct Squeeze {
  uint64_t places[256];
  constexpr Squeeze() : places() {
    for (uint64_t mask = 0; mask < 256; ++mask) {
      int place = 0;
      for (uint64_t i = 0; i < 8; ++i) {
        if ((mask >> i) & 1) places[mask] |= i << (8 * place++);
      }
    }
  }
};
constexpr Squeeze kSqueeze;

struct Vec {
  using F = __m256;
  using U = __m256i;
  using Mask = __m256;
  static constexpr int N = 8;
  static constexpr bool kScaleSaturates = false;  // scale() takes any exponent, and NaN
  // Of 2^f on [-1/2, 1/2], the minimax fit whose value at 0 is 1.
  static constexpr float kPower[] = {1.0f,          6.931470e-1f, 2.4022242e-1f,
                                     5.5507336e-2f, 9.671513e-3f, 1.3264727e-3f};

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // t less the nearest integer, and n as scale() takes it: that integer + 127 in its lowest bits.
  static F fraction(F t, F& n) {
    const F magic = set(12583039.0f);  // 1.5 * 2^23 + 127
    n = t + magic;
    return t - (n - magic);
  }
  static F scale(F x, F n) {  // for integers from -127 (0 is the result) to 127
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n), 23));
  }
  static Mask ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  static uint32_t bits(Mask m) { return (uint32_t)_mm256_movemask_ps(m); }
  // The floats whose bits are set, in order, at the front.
  static F squeeze(F x, uint32_t bits) {
    const __m128i places = _mm_cvtsi64_si128((long long)kSqueeze.places[bits]);
    return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(places));
  }
  // Integers i, i + 1, ..., as the bits of floats.
  static F count_up(int i) {
    const U steps = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_set1_epi32(i), steps));
  }
  static Mask mask(uint32_t bits) {  // of the lowest N bits
    const U each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const U here = _mm256_and_si256(_mm256_set1_epi32((int)bits), each);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(here, each));
  }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static float sum(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static float top(F x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }

  static F load_bf16(const uint16_t* p) {
    const U x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
};
