// AVX-512 (F, BW, DQ, VL): 512-bit vectors, masks.

#define FASTGRU_VECTOR_BYTES 64
constexpr int kVectorBytes = FASTGRU_VECTOR_BYTES, kVectorRegisters = 32;
constexpr bool kFusedMultiplyAdd = true, kMaskedMemory = true, kClampInstructions = true, kScaleInstruction = true;
#if defined(FASTGRU_NATIVE_BF16)
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif

#include "types.inl.h"

FASTGRU_INLINE vf32 fma(vf32 a, vf32 b, vf32 c) { return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FASTGRU_INLINE vf64 fma(vf64 a, vf64 b, vf64 c) { return (vf64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }

FASTGRU_INLINE vf32 widen(const f16*, vu16half bits) { return (vf32)_mm512_cvtph_ps((__m256i)bits); }
FASTGRU_INLINE vu16half narrow(const f16*, vf32 v) {
  return (vu16half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}

// The first n < lanes elements; masked_load() puts zero into the other lanes.
FASTGRU_INLINE vf32 masked_load(const float* p, int n) {
  return (vf32)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
FASTGRU_INLINE vf64 masked_load(const double* p, int n) {
  return (vf64)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
FASTGRU_INLINE void masked_store(float* p, vf32 v, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
FASTGRU_INLINE void masked_store(double* p, vf64 v, int n) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}

// One instruction for each bound, which compilers do not find: it returns its second operand where one of them is NaN.
FASTGRU_INLINE vf32 clamp_instructions(vf32 x, vf32 low, vf32 high) {
  x = (vf32)_mm512_max_ps((__m512)low, (__m512)x);
  return (vf32)_mm512_min_ps((__m512)high, (__m512)x);
}

// v 2^n, rounded once.
FASTGRU_INLINE vf32 scale_instruction(vf32 v, vf32 n) { return (vf32)_mm512_scalef_ps((__m512)v, (__m512)n); }
FASTGRU_INLINE vf64 scale_instruction(vf64 v, vf64 n) { return (vf64)_mm512_scalef_pd((__m512d)v, (__m512d)n); }
