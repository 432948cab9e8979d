// The AVX-512 engine with bf16 products on the processor's own instruction (AVX512_BF16). Only the bf16 entries differ.
#include "../attention/types.h"
#include "../gru/types.h"
#include "../kernel_table.h"
#include "../platform.h"
#include "../threads/phases.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <new>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define FASTGRU_ISA avx512_bf16
#define FASTGRU_SIMD "../simd/avx512_bf16.inl.h"
#include "engine.inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const fastgru::Engine* fastgru::engine_avx512_bf16() { return &avx512_bf16::engine; }
#else
const fastgru::Engine* fastgru::engine_avx512_bf16() { return nullptr; }
#endif
