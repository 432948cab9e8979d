// What blocks that talk through global memory need beyond primitives.cuh; on the CPU tests/emulation implements it.
//
// Words in the exchange change while the kernel runs. Each is looked at and set as a whole, and nothing else is said of
// order, but for this: what a thread set before its fence is seen by whoever, after a fence of its own, looks again
// once it has seen something that was set after.
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

// Whether it is true in all 32 lanes; they call it together.
FASTGRU_DEVICE bool all_lanes(bool mine) { return __all_sync(0xffffffff, mine); }

}  // namespace cuda
}  // namespace fastgru

#endif
