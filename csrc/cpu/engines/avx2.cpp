// The engine for AVX2 with FMA and F16C.
#include "../attention/types.h"
#include "../gru/types.h"
#include "../kernel_table.h"
#include "../platform.h"
#include "../threads/phases.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <new>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTGRU_ISA avx2
#define FASTGRU_SIMD "../simd/avx2.inl.h"
#include "engine.inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const fastgru::Engine* fastgru::engine_avx2() { return &avx2::engine; }
#else
const fastgru::Engine* fastgru::engine_avx2() { return nullptr; }
#endif
