// AVX2 with FMA and F16C: 256-bit vectors.

#define FASTGRU_VECTOR_BYTES 32
constexpr int kVectorBytes = FASTGRU_VECTOR_BYTES, kVectorRegisters = 16;
constexpr bool kFusedMultiplyAdd = true, kMaskedMemory = false, kClampInstructions = false;
constexpr bool kScaleInstruction = false, kMultipliesBf16 = false;

#include "types.inl.h"

FASTGRU_INLINE vf32 fma(vf32 a, vf32 b, vf32 c) { return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FASTGRU_INLINE vf64 fma(vf64 a, vf64 b, vf64 c) { return (vf64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }

FASTGRU_INLINE vf32 widen(const f16*, vu16half bits) { return (vf32)_mm256_cvtph_ps((__m128i)bits); }
FASTGRU_INLINE vu16half narrow(const f16*, vf32 v) {
  return (vu16half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
