// Implements csrc/cuda/primitives.cuh on the CPU: the same functions, carried out by a Machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define FASTGRU_DEVICE inline

namespace fastgru {
namespace cuda {

using std::max;
using std::min;

inline emulation::Machine& machine() { return *emulation::Machine::current(); }

FASTGRU_DEVICE int thread_index() { return machine().thread(); }
FASTGRU_DEVICE int block_index_x() { return machine().block_x(); }
FASTGRU_DEVICE int block_index_y() { return machine().block_y(); }
FASTGRU_DEVICE int cluster_rank() { return machine().rank(); }

template <typename T>
FASTGRU_DEVICE T load_global(const T* p) {
  machine().check_global(p, sizeof(T), false);
  return *p;
}

template <typename T>
FASTGRU_DEVICE T load_constant(const T* p) {
  return load_global(p);
}

template <typename T>
FASTGRU_DEVICE void store_global(T* p, T value) {
  machine().check_global(p, sizeof(T), true);
  *p = value;
}

template <int N>
FASTGRU_DEVICE void load_shared(uint32_t offset, uint32_t (&words)[N]) {
  machine().load_shared(offset, words, sizeof(words));
}

template <int N>
FASTGRU_DEVICE void store_shared(uint32_t offset, const uint32_t (&words)[N]) {
  machine().store_shared(offset, words, sizeof(words));
}

FASTGRU_DEVICE void sync_threads() { machine().sync_threads(); }
FASTGRU_DEVICE void sync_cluster() { machine().sync_cluster(); }
FASTGRU_DEVICE void barrier_init(uint32_t offset, uint32_t arrivals) { machine().barrier_init(offset, arrivals); }
FASTGRU_DEVICE void barrier_init_fence() {}
FASTGRU_DEVICE void barrier_arrive_and_expect(uint32_t offset, uint32_t bytes) {
  machine().barrier_arrive_and_expect(offset, bytes);
}
FASTGRU_DEVICE void barrier_wait(uint32_t offset, uint32_t parity) { machine().barrier_wait(offset, parity); }
FASTGRU_DEVICE void send(int peer, uint32_t offset, const uint32_t (&words)[4], uint32_t barrier) {
  machine().send(peer, offset, words, barrier);
}

FASTGRU_DEVICE uint32_t shuffle(uint32_t value, int lane) {
  struct In {
    uint32_t value;
    int lane;
  };
  return machine().warp_collective<In, uint32_t>({value, lane}, [](const In* in, uint32_t* out) {
    for (int i = 0; i < 32; ++i) out[i] = in[in[i].lane & 31].value;
  });
}

FASTGRU_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

FASTGRU_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

FASTGRU_DEVICE float bf16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

FASTGRU_DEVICE float f16_to_float(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24));
}

// Rounds off the low `dropped` bits of a finite number, to nearest; ties to even, or away from zero.
inline uint32_t round_off(uint32_t bits, int dropped, bool ties_to_even) {
  const uint32_t half = 1u << (dropped - 1);
  const uint32_t up = ties_to_even ? half - 1 + (bits >> dropped & 1) : half;
  return (bits + up) >> dropped << dropped;
}

inline uint32_t to_bf16(float x) { return std::isnan(x) ? 0x7fff : round_off(bits_of(x), 16, true) >> 16; }

inline uint32_t to_f16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  x = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (x >= 65520.0f) return sign | 0x7c00;
  // Subnormal numbers are multiples of 2^-24: nearbyint rounds ties to even.
  if (x < 0x1p-14f) return sign | uint32_t(std::nearbyint(x * 0x1p24f));
  const uint32_t rounded = round_off(bits_of(x), 13, true);
  return sign | ((rounded >> 13) - (112u << 10));
}

FASTGRU_DEVICE uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
FASTGRU_DEVICE uint32_t pack_f16(float low, float high) { return to_f16(low) | to_f16(high) << 16; }
FASTGRU_DEVICE uint32_t round_tf32(float x) { return std::isnan(x) ? 0x7fffffff : round_off(bits_of(x), 13, false); }

FASTGRU_DEVICE float exponential(float x) { return std::exp(x); }
FASTGRU_DEVICE float reciprocal(float x) { return 1.0f / x; }

// Products and sums in float32: the tensor cores' own rounding is not modelled.
template <Precision P>
FASTGRU_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct In {
    float c[4];
    uint32_t a[4], b[2];
  };
  struct Out {
    float c[4];
  };
  In mine;
  std::memcpy(mine.c, c, sizeof(c));
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Out result = machine().warp_collective<In, Out>(mine, [](const In* in, Out* out) {
    constexpr int K = P == Precision::tf32 ? 8 : 16;
    float left[16][K], right[K][8];
    const auto number = [](uint32_t word, int half) {
      const uint16_t bits = uint16_t(word >> 16 * half);
      return P == Precision::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < K / 8; ++half) {
          const int k = K == 8 ? t + 4 * (i / 2) : 2 * t + half + 8 * (i / 2);
          left[g + 8 * (i % 2)][k] = K == 8 ? float_of(in[lane].a[i]) : number(in[lane].a[i], half);
        }
      for (int i = 0; i < 2; ++i)
        for (int half = 0; half < K / 8; ++half) {
          const int k = K == 8 ? t + 4 * i : 2 * t + half + 8 * i;
          right[k][g] = K == 8 ? float_of(in[lane].b[i]) : number(in[lane].b[i], half);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = in[lane].c[i];
        for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
        out[lane].c[i] = sum;
      }
  });
  std::memcpy(c, result.c, sizeof(c));
}

}  // namespace cuda
}  // namespace fastgru
