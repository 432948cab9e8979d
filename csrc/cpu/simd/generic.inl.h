// Any processor: 128-bit vectors of the compiler's own, without fused multiply-adds.

#define FASTGRU_VECTOR_BYTES 16
constexpr int kVectorBytes = FASTGRU_VECTOR_BYTES, kVectorRegisters = 16;
constexpr bool kFusedMultiplyAdd = false, kMaskedMemory = false, kClampInstructions = false;
constexpr bool kScaleInstruction = false, kMultipliesBf16 = false;

#include "types.inl.h"

FASTGRU_INLINE vf32 fma(vf32 a, vf32 b, vf32 c) { return a * b + c; }
FASTGRU_INLINE vf64 fma(vf64 a, vf64 b, vf64 c) { return a * b + c; }

FASTGRU_INLINE vf32 widen(const f16*, vu16half bits) {
  // Exponent and mantissa moved into place and scaled by 2^112, which also normalises subnormals exactly.
  const vu32 h = __builtin_convertvector(bits, vu32);
  const vu32 sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  const vu32 finite = (vu32)((vf32)rest * splat<float>(0x1p112f));
  const vu32 special = rest | 0x7f800000u;
  return (vf32)(sign | (rest >= 0x0f800000u ? special : finite));
}
FASTGRU_INLINE vu16half narrow(const f16*, vf32 v) {
  const vu32 bits = (vu32)v, sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // Normal results: round the mantissa in place. Subnormal results: adding 0.5 aligns the ulp to 2^-24.
  const vu32 normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const vu32 subnormal = (vu32)((vf32)rest + splat<float>(0.5f)) - 0x3f000000u;
  vu32 h = rest < 0x38800000u ? subnormal : normal;
  h = rest >= 0x47800000u ? vu32{} + 0x7c00u : h;
  h = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x3ffu) : h;
  return __builtin_convertvector(h | sign, vu16half);
}
