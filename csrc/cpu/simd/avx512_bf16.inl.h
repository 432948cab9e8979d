// AVX-512 with AVX512-BF16: products of bf16, two neighbouring k at a time, accumulated in float.

#define FASTGRU_NATIVE_BF16 1
#include "avx512.inl.h"

FASTGRU_INLINE vf32 multiply_add(const bf16* a, vf32 b, vf32 acc) {
  int32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return (vf32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)(__m512)b);
}

// The first n <= 2 W elements, two to a lane, and the first n <= W, one to a lane; zero in the others.
FASTGRU_INLINE vf32 load_pairs(const bf16* p, int n) {
  return (vf32)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
}
FASTGRU_INLINE vu16half load_bits(const bf16* p, int n) {
  return (vu16half)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
}
