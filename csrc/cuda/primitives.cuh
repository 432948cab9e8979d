// Wraps every CUDA feature that the persistent kernels use. Their bodies call nothing else, so that the same source
// runs on the CPU: tests/emulation implements this interface a second time.
//
// Shared memory is addressed by the byte offset in the block's dynamic shared memory. The offsets are the same in all
// blocks of a cluster.
#pragma once

#include <cstdint>

#include "precision.h"

#if !defined(__CUDACC__)
#include "emulated_primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTGRU_DEVICE __device__ __forceinline__

namespace fastgru {
namespace cuda {

// --- Indices

FASTGRU_DEVICE int thread_index() { return threadIdx.x; }
FASTGRU_DEVICE int block_index_x() { return blockIdx.x; }
FASTGRU_DEVICE int block_index_y() { return blockIdx.y; }

FASTGRU_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// --- Memory

extern __shared__ __align__(128) unsigned char shared_memory[];

FASTGRU_DEVICE uint32_t shared_address(uint32_t offset) {
  return uint32_t(__cvta_generic_to_shared(shared_memory)) + offset;
}

template <typename T>
FASTGRU_DEVICE T load_global(const T* p) {
  return *p;
}

// For memory that is read-only while the kernel runs.
template <typename T>
FASTGRU_DEVICE T load_constant(const T* p) {
  return __ldg(p);
}

template <typename T>
FASTGRU_DEVICE void store_global(T* p, T value) {
  *p = value;
}

FASTGRU_DEVICE void load_shared(uint32_t offset, uint32_t (&words)[2]) {
  const uint2 v = *reinterpret_cast<const uint2*>(shared_memory + offset);
  words[0] = v.x, words[1] = v.y;
}

FASTGRU_DEVICE void load_shared(uint32_t offset, uint32_t (&words)[4]) {
  const uint4 v = *reinterpret_cast<const uint4*>(shared_memory + offset);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

FASTGRU_DEVICE void store_shared(uint32_t offset, const uint32_t (&words)[1]) {
  *reinterpret_cast<uint32_t*>(shared_memory + offset) = words[0];
}

FASTGRU_DEVICE void store_shared(uint32_t offset, const uint32_t (&words)[2]) {
  *reinterpret_cast<uint2*>(shared_memory + offset) = make_uint2(words[0], words[1]);
}

FASTGRU_DEVICE void store_shared(uint32_t offset, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(shared_memory + offset) = make_uint4(words[0], words[1], words[2], words[3]);
}

// --- Barriers

FASTGRU_DEVICE void sync_threads() { __syncthreads(); }

// Barrier of all threads of the cluster. Their earlier writes to shared memory and to barriers are visible after it.
FASTGRU_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// An mbarrier: 8 bytes of shared memory. A phase ends when `arrivals` threads have arrived and as many bytes have been
// delivered as they announced.
FASTGRU_DEVICE void barrier_init(uint32_t offset, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(offset)), "r"(arrivals) : "memory");
}

// Makes barrier_init visible to other blocks; comes before the sync_cluster after which they send.
FASTGRU_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FASTGRU_DEVICE void barrier_arrive_and_expect(uint32_t offset, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(offset)), "r"(bytes)
               : "memory");
}

// Waits for the end of the current phase if its parity is `parity`; parities alternate, from 0. Bytes delivered during
// a phase are visible after it.
FASTGRU_DEVICE void barrier_wait(uint32_t offset, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(offset)), "r"(parity)
        : "memory");
  } while (!done);
}

// Stores 16 bytes asynchronously (st.async) at `offset` in the block of rank `peer`, possibly the sender's own, and
// counts them at the barrier there. Messages arrive in any order.
FASTGRU_DEVICE void send(int peer, uint32_t offset, const uint32_t (&words)[4], uint32_t barrier) {
  uint32_t base;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(base) : "r"(shared_address(0)), "r"(peer));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   base + offset),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(base + barrier)
               : "memory");
}

// --- Warps

// `value` of the given lane; all 32 lanes call it together.
FASTGRU_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffff, value, lane); }

// c += a b, by a warp together. Of lane 4g + t: c holds rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1.
// bf16 and f16: a is 16x16, its registers are two values each of rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8,
// 2t + 8; b is 16x8, rows 2t and 2t + 8, column g. tf32: a is 16x8, rows g, g + 8, g, g + 8, columns t, t, t + 4, t +
// 4; b is 8x8, rows t and t + 4, column g.
//
// mma.sync, not wgmma: with 8 or 16 columns the tensor cores wait anyway, wgmma wants 64 rows of the left operand
// together, and compute capability 10.0 no longer has it.
template <Precision P>
FASTGRU_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (P == Precision::bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (P == Precision::f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// --- Numbers

FASTGRU_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTGRU_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

FASTGRU_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
FASTGRU_DEVICE float f16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Rounded to nearest, ties to even; the first in the low half.
FASTGRU_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

FASTGRU_DEVICE uint32_t pack_f16(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Rounded to TF32, to nearest, ties away from zero.
FASTGRU_DEVICE uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Both to about two units in the last place; reciprocal gives 0 where x is infinite.
FASTGRU_DEVICE float exponential(float x) { return __expf(x); }
FASTGRU_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }

}  // namespace cuda
}  // namespace fastgru

#endif
