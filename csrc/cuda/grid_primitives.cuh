// Wraps the relaxed loads and stores, the fence and the warp vote that blocks use to exchange words through global
// memory. On the CPU tests/emulation implements them.
//
// Memory order: every load and store is relaxed and of a whole argument. Two fences synchronise: the stores of a thread
// before its fence are visible to a thread that loads one of its later stores and then passes a fence of its own.
#pragma once

#include "primitives.cuh"

#if !defined(__CUDACC__)
#include "emulated_grid_primitives.h"
#else

namespace fastgru {
namespace cuda {

FASTGRU_DEVICE void load_relaxed(const uint32_t* from, uint32_t (&words)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from) : "memory");
}

FASTGRU_DEVICE void store_relaxed(uint32_t* to, const uint32_t (&words)[1]) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
}

FASTGRU_DEVICE void store_relaxed(uint32_t* to, const uint32_t (&words)[2]) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
}

FASTGRU_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Whether `mine` is true in all 32 lanes, which call it together.
FASTGRU_DEVICE bool all_lanes(bool mine) { return __all_sync(0xffffffff, mine); }

}  // namespace cuda
}  // namespace fastgru

#endif
