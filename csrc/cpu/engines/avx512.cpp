// The engine for AVX-512 (F, BW, DQ, VL).
#include "../attention/types.h"
#include "../gru/types.h"
#include "../kernel_table.h"
#include "../platform.h"
#include "../threads/phases.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <new>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FASTGRU_ISA avx512
#define FASTGRU_SIMD "../simd/avx512.inl.h"
#include "engine.inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const fastgru::Engine* fastgru::engine_avx512() { return &avx512::engine; }
#else
const fastgru::Engine* fastgru::engine_avx512() { return nullptr; }
#endif
