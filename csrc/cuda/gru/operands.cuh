// Defines the layouts of the operands of mma.sync in shared memory, and sigmoid and tanh, for kernels that keep W_hh on
// chip.
//
// W_hh is the left operand, so that rows of the batch are the columns of the right one, 8 at a time; as the left
// operand they would come 16 or 64 at a time. Hidden units come in tiles of 16. A thread computes units g and g + 8 of
// a tile, g < 8, for one column: a *pair*. The order of a sum is free as long as both operands agree. Here a pair is
// one word (bf16, f16) or two neighbouring words (tf32) of the right operand.
//
// A right operand in shared memory is a sequence of *blocks* of 256 bytes, one per instruction: 16 units (bf16, f16) or
// 8 (tf32) by 8 columns. Lane l reads bytes 8l to 8l + 7.
//
// A *fragment* is the result of an instruction: 16 units by 8 columns in float32, 512 bytes, 16 written by each lane.
// Their order keeps that write and the read of pairs free of bank conflicts.
#pragma once

#include <type_traits>

#include "cuda/primitives.cuh"
#include "types.h"

namespace fastgru {
namespace cuda {

constexpr int TILE = 16;  // units
constexpr int COLUMNS = 8;
constexpr int BLOCK_BYTES = 256;
constexpr int FRAGMENT_BYTES = 512;

constexpr int blocks_per_tile(Precision precision) { return precision == Precision::tf32 ? 2 : 1; }

// Conversions of one precision. Of the 64 threads for a tile by 8 columns thread i has column i / 8 and pair
// pair_of(i % 8), so that neighbouring threads hold neighbouring words of the operand.
template <Precision P>
struct Numbers {
  static constexpr bool WIDE = P == Precision::tf32;
  using Stored = std::conditional_t<WIDE, float, uint16_t>;
  static constexpr int BLOCKS = blocks_per_tile(P);
  static constexpr int PAIR_WORDS = WIDE ? 2 : 1;
  static constexpr int PAIRS_PER_MESSAGE = 4 / PAIR_WORDS;

  static FASTGRU_DEVICE int pair_of(int i) { return WIDE ? i : (i >> 1) + 4 * (i & 1); }

  // The offset of a pair in the blocks of its tile.
  static FASTGRU_DEVICE uint32_t pair_offset(int column, int pair) {
    return (column * 4 + (pair & 3)) * 8 + (pair >> 2) * (WIDE ? BLOCK_BYTES : 4);
  }

  static FASTGRU_DEVICE float widen(Stored x) {
    if constexpr (P == Precision::bf16) return bf16_to_float(x);
    if constexpr (P == Precision::f16) return f16_to_float(x);
    if constexpr (P == Precision::tf32) return x;
  }

  // A pair in the format of an operand.
  static FASTGRU_DEVICE void to_operand(float low, float high, uint32_t (&words)[PAIR_WORDS]) {
    if constexpr (P == Precision::bf16) words[0] = pack_bf16(low, high);
    if constexpr (P == Precision::f16) words[0] = pack_f16(low, high);
    if constexpr (P == Precision::tf32) words[0] = round_tf32(low), words[1] = round_tf32(high);
  }

  // A pair in the format of arrays.
  static FASTGRU_DEVICE void to_stored(float low, float high, Stored (&pair)[2]) {
    if constexpr (WIDE) {
      pair[0] = low, pair[1] = high;
    } else {
      uint32_t word[1];
      to_operand(low, high, word);
      pair[0] = uint16_t(word[0]), pair[1] = uint16_t(word[0] >> 16);
    }
  }

  // This lane's part of a left operand, 16 rows by the units of a block. element(row, unit) is a Stored.
  template <typename Element>
  static FASTGRU_DEVICE void load_left(uint32_t (&words)[4], int lane, int block, Element element) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1);
      if constexpr (WIDE) {
        words[i] = round_tf32(element(row, (block >> 1) * TILE + (block & 1) * 4 + t + 8 * (i >> 1)));
      } else {
        const int unit = block * TILE + t + 4 * (i >> 1);
        words[i] = uint32_t(element(row, unit)) | uint32_t(element(row, unit + 8)) << 16;
      }
    }
  }
};

// Writes this lane's part of a fragment to `words`, which go to fragment_offset(lane).
FASTGRU_DEVICE void fragment_words(const float (&c)[4], uint32_t (&words)[4]) {
  words[0] = bits_of(c[0]), words[1] = bits_of(c[2]), words[2] = bits_of(c[1]), words[3] = bits_of(c[3]);
}

FASTGRU_DEVICE uint32_t fragment_offset(int lane) {
  const int g = lane / 4, t = lane % 4;
  return (t * 8 + (g ^ (2 * t))) * 16;
}

// The offset of a pair, 8 bytes, in a fragment.
FASTGRU_DEVICE uint32_t fragment_pair_offset(int column, int pair) {
  const int t = column / 2;
  return (t * 8 + (pair ^ (2 * t))) * 16 + (column & 1) * 8;
}

FASTGRU_DEVICE float sigmoid(float x) { return reciprocal(1.0f + exponential(-x)); }

FASTGRU_DEVICE float tanh(float x) {
  // Through the exponential of a negative number, which cannot overflow.
  const float e = exponential(-2.0f * fabsf(x));
  return copysignf((1.0f - e) * reciprocal(1.0f + e), x);
}

// The first token of step t, and the number of steps of batch row b. types.h describes `table`.
FASTGRU_DEVICE int first_token(const int32_t* table, int t, int B) { return table ? load_constant(table + t) : t * B; }

FASTGRU_DEVICE int row_steps(const int32_t* table, int T, int b) {
  return table ? load_constant(table + T + 1 + b) : T;
}

}  // namespace cuda
}  // namespace fastgru
