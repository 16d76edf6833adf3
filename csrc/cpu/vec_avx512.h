// AVX-512 (F, BW, DQ, VL): 16 floats a vector. Included inside the architecture's own namespace.
struct Vec {
  using F = __m512;
  using Mask = __mmask16;
  static constexpr int N = 16;
  static constexpr bool kScaleSaturates = true;  // scale() takes any exponent, and NaN
  // Of 2^f on [0, 1], the minimax fit.
  static constexpr float kPower[] = {9.9999994e-1f, 6.931531e-1f, 2.4015361e-1f,
                                     5.5826318e-2f, 8.989341e-3f, 1.8775767e-3f};

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // t less its floor, and n as scale() takes it.
  static F fraction(F t, F& n) {
    n = t;
    return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static F scale(F x, F n) { return _mm512_scalef_ps(x, n); }  // floors n by itself
  static Mask ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
  // Through a general register: gcc 12 may spill a widened mask as 16 bits and read 32 back.
  static uint32_t bits(Mask m) {
    uint32_t wide = m;
    __asm__("" : "+r"(wide));
    return wide;
  }
  // The floats whose bits are set, in order, at the front.
  static F squeeze(F x, uint32_t bits) { return _mm512_maskz_compress_ps((Mask)bits, x); }
  // Integers i, i + 1, ..., as the bits of floats.
  static F count_up(int i) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_set1_epi32(i), steps));
  }
  static Mask mask(uint32_t bits) { return (Mask)bits; }  // of the lowest N bits
  static Mask both(Mask a, Mask b) { return a & b; }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  static float top(F x) { return _mm512_reduce_max_ps(x); }

  static F load_bf16(const uint16_t* p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
};
