// Computes the states before each token, and the gates again from finished products. tokens.h has every pointer and its
// shape. Blocks are independent; the kernels are bound by memory bandwidth.
#pragma once

#include <algorithm>

#include "operands.cuh"
#include "tokens.h"

namespace fastgru {
namespace cuda {

constexpr int TOKEN_THREADS = 256;
// Batch rows of a step that one block moves.
constexpr int ROWS_PER_BLOCK = 8;

struct alignas(16) SixteenBytes {
  uint32_t words[4];
};

// Blocks: x = step and, within it, batch rows; y = direction. `words`: Words in the H elements of a token.
template <typename Word>
FASTGRU_DEVICE void gru_previous_states_block(const GruTokens& s, int words, const Word* output, const Word* hx,
                                              Word* previous) {
  const int chunks = (s.B + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
  const int t = block_index_x() / chunks, direction = block_index_y(), before = direction == 0 ? t - 1 : t + 1;
  const int first = first_token(s.table, t, s.B), size = first_token(s.table, t + 1, s.B) - first;
  const bool has_before = before >= 0 && before < s.T;
  const int last_first = has_before ? first_token(s.table, before, s.B) : 0;
  const int last_size = has_before ? first_token(s.table, before + 1, s.B) - last_first : 0;
  const int b0 = block_index_x() % chunks * ROWS_PER_BLOCK;
  const int count = min(ROWS_PER_BLOCK, size - b0);
  for (int i = thread_index(); i < count * words; i += TOKEN_THREADS) {
    const int b = b0 + i / words, word = i % words;
    const Word* from = b < last_size ? output + (int64_t(last_first + b) * s.D + direction) * words
                                     : hx + (int64_t(direction) * s.B + b) * words;
    store_global(previous + (int64_t(first + b) * s.D + direction) * words + word, load_global(from + word));
  }
}

//     r = sigmoid(i_r + b_ir + g_r + b_hr)    z = sigmoid(i_z + b_iz + g_z + b_hz)
//     q = g_n + b_hn                          n = tanh(i_n + b_in + r * q)
//
// Blocks: x = token, y = direction. Padding holds the equations' values of zeros.
template <Precision P>
FASTGRU_DEVICE void gru_gates_block(const GruTokens& s, const typename Numbers<P>::Stored* i,
                                    const typename Numbers<P>::Stored* g, const typename Numbers<P>::Stored* b_ih,
                                    const typename Numbers<P>::Stored* b_hh, typename Numbers<P>::Stored* gates) {
  using Num = Numbers<P>;
  const int token = block_index_x(), direction = block_index_y(), stride = (s.H + 15) / 16 * 16;
  const int64_t at = (int64_t(token) * s.D + direction) * 3 * s.H;
  const auto to = gates + (int64_t(direction) * s.N + token) * 4 * stride;
  for (int first = 2 * thread_index(); first < stride; first += 2 * TOKEN_THREADS) {
    float saved[4][2] = {};
    for (int half = 0; half < 2; ++half) {
      const int unit = first + half;
      float of_i[3] = {}, of_g[3] = {};
      if (unit < s.H)
        for (int gate = 0; gate < 3; ++gate) {
          const int column = gate * s.H + unit;
          of_i[gate] = Num::widen(load_constant(i + at + column));
          of_g[gate] = Num::widen(load_constant(g + at + column));
          if (b_ih != nullptr) {
            of_i[gate] += Num::widen(load_constant(b_ih + direction * 3 * s.H + column));
            of_g[gate] += Num::widen(load_constant(b_hh + direction * 3 * s.H + column));
          }
        }
      saved[0][half] = sigmoid(of_i[0] + of_g[0]);
      saved[1][half] = sigmoid(of_i[1] + of_g[1]);
      saved[2][half] = tanh(of_i[2] + saved[0][half] * of_g[2]);
      saved[3][half] = of_g[2];
    }
    for (int kind = 0; kind < 4; ++kind) {
      typename Num::Stored pair[2];
      Num::to_stored(saved[kind][0], saved[kind][1], pair);
      store_global(to + kind * stride + first, pair[0]);
      store_global(to + kind * stride + first + 1, pair[1]);
    }
  }
}

}  // namespace cuda
}  // namespace fastgru
