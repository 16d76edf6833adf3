// AVX2 + FMA + F16C: 8 floats a vector. Included inside the architecture's own namespace.
struct Vec {
  using F = __m256;
  using U = __m256i;
  using Mask = __m256;
  static constexpr int N = 8;
  static constexpr bool kScaleSaturates = false;  // scale() takes any exponent, and NaN

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fraction(F t) { return t - _mm256_floor_ps(t); }
  static F scale(F x, F t, F f) {  // x * 2^(t - f)
    const U n = _mm256_cvtps_epi32(t - f);
    const U e = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
  }
  static Mask ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
  static uint32_t bits(Mask m) { return (uint32_t)_mm256_movemask_ps(m); }
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
