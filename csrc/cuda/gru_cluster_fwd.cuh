// Forward recurrence of one GRU layer, W_hh resident in a cluster of blocks. For each step, with i = x W_ih^T at hand:
//
//     g = h W_hh^T
//     r = sigmoid(i_r + b_ir + g_r + b_hr)            z = sigmoid(i_z + b_iz + g_z + b_hz)
//     n = tanh(i_n + b_in + r * (g_n + b_hn))         h' = n + z * (h - n)
//
// GruForwardLoop has every pointer. Saved for backward, where wanted: r, z, n, g_n + b_hn.
//
// Who owns what. A cluster runs 8 * COLUMN_TILES rows of the batch in one direction; clusters know nothing of each
// other. A block owns some tiles of 16 hidden units, in all three gates, and has their rows of W_hh in registers and
// shared memory for the whole sequence. A warp multiplies the three gates of one tile with a slice of h, so that r, z
// and n of a unit meet in one place; one thread of 64 per tile and 8 columns then adds the slices up and computes two
// units of one column, whose h it carries in float32.
//
// The exchange. h as operand lies in every block, twice: step s reads buffer s % 2, and its result goes to buffer
// (s + 1) % 2 of every block, the own one included, as messages of 16 bytes that count down the barrier of that buffer.
// A phase of a barrier is the arrival of all of h.
//   - A message for step s + 1 overwrites what was read in step s - 1. Its sender has all of h for step s, hence heard
//     from the receiving block in step s - 1 after that had read its operand: the receiver's own pairs were computed
//     from sums that all its warps had finished, with a block barrier in between. This needs every block to own a tile.
//   - For the same reason no message of the phase after next comes before the next phase has ended; whether messages
//   come
//     before the barrier is told how many to expect makes no difference.
//   - The sums of the warps are overwritten in step s + 1 by warps that have all of h, the own block's part included,
//     hence after the sums of step s were read.
//   - The last step sends nothing. All that was sent has then arrived; the closing cluster barrier only makes the end
//   of
//     a block's life independent of that argument.
// So that no cluster barrier stands in the loop: a step pays for one block barrier and one message.
#pragma once

#include "gru_cluster_shape.h"

namespace fastgru {
namespace cuda {

template <Precision P, int COLUMN_TILES>
FASTGRU_DEVICE void gru_cluster_forward_block(const GruForwardLoop& loop, const ForwardShape& shape) {
  using Num = Numbers<P>;
  using Stored = typename Num::Stored;
  constexpr int RESIDENT = FORWARD_RESIDENT<COLUMN_TILES>;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int rank = cluster_rank(), direction = block_index_y();
  const int b0 = block_index_x() / shape.cluster * (COLUMNS * COLUMN_TILES);
  const int H = loop.H, D = loop.D;
  const int own_tiles = (shape.tiles - rank + shape.cluster - 1) / shape.cluster;
  // Rows are sorted by length: the first of the cluster is the longest.
  const int steps = row_steps(loop.rows, loop.T, b0);
  const auto time_of = [&](int step) { return direction == 0 ? step : steps - 1 - step; };

  // --- The pair of this thread

  const int slot = thread / 64, own_tile = slot / COLUMN_TILES, column_tile = slot % COLUMN_TILES;
  const int column = thread % 64 / 8, place = thread % 8, pair = Num::pair_of(place);
  const bool has_pair = own_tile < own_tiles;
  const int b = b0 + column_tile * COLUMNS + column;
  const int length = has_pair && b < loop.B ? row_steps(loop.rows, loop.T, b) : 0;
  const int tile = rank + own_tile * shape.cluster;
  const int unit[2] = {tile * TILE + pair, tile * TILE + pair + 8};

  // --- Weights of this warp

  const auto w_hh = static_cast<const Stored*>(loop.w_hh) + int64_t(direction) * 3 * H * H;
  const int warp_tile = warp / shape.slices, first_block = warp % shape.slices * shape.slice_blocks;
  const int block_count = warp_tile < own_tiles ? min(shape.slice_blocks, shape.tiles * Num::BLOCKS - first_block) : 0;
  const auto load_left = [&](uint32_t (&words)[4], int block, int gate) {
    Num::load_left(words, lane, first_block + block, [&](int row, int k) {
      const int out = (rank + warp_tile * shape.cluster) * TILE + row;
      return out < H && k < H ? load_constant(w_hh + int64_t(gate * H + out) * H + k) : Stored(0);
    });
  };
  const auto left_offset = [&](int at, int block, int gate) {
    return at + ((block * 3 + gate) * shape.warps + warp) * LEFT_BYTES + lane * 16;
  };
  const auto gather = [&](int at, int from, int to) {
    for (int block = from; block < to; ++block)
      for (int gate = 0; gate < 3; ++gate) {
        uint32_t words[4];
        load_left(words, block, gate);
        store_shared(left_offset(at, block - from, gate), words);
      }
  };
  // Those for registers take the way through shared memory, where nothing else is yet: a loop can then gather them,
  // where registers need an unrolled one. Each lane reads what it wrote.
  uint32_t left[RESIDENT][3][4];
  gather(0, 0, min(RESIDENT, block_count));
#pragma unroll
  for (int block = 0; block < RESIDENT; ++block)
#pragma unroll
    for (int gate = 0; gate < 3; ++gate)
      if (block < block_count) load_shared(left_offset(0, block, gate), left[block][gate]);
  sync_threads();
  gather(shape.left, RESIDENT, block_count);

  // --- What the pair begins with

  float h[2] = {0, 0};
  if (has_pair && b < loop.B) {
    const auto hx = static_cast<const Stored*>(loop.hx) + (int64_t(direction) * loop.B + b) * H;
    for (int i = 0; i < 2; ++i)
      if (unit[i] < H) h[i] = Num::widen(load_constant(hx + unit[i]));
  }

  // Biases of r, z, n and g_n, those of r and z summed, are kept in shared memory: registers are for weights.
  const auto bias_offset = [&](int kind) {
    return shape.bias + ((kind * CLUSTER_WARPS / 2 + own_tile) * 8 + pair) * 8;
  };
  if (has_pair && column_tile == 0 && column == 0) {
    const auto bias_of = [&](const void* biases, int gate, int unit) {
      const auto from = static_cast<const Stored*>(biases) + (direction * 3 + gate) * H + unit;
      return biases != nullptr && unit < H ? Num::widen(load_constant(from)) : 0.0f;
    };
    for (int kind = 0; kind < 4; ++kind) {
      uint32_t words[2];
      for (int i = 0; i < 2; ++i) {
        const float of_i = kind < 3 ? bias_of(loop.b_ih, kind, unit[i]) : 0.0f;
        const float of_g = kind != 2 ? bias_of(loop.b_hh, kind < 3 ? kind : 2, unit[i]) : 0.0f;
        words[i] = bits_of(of_i + of_g);
      }
      store_shared(bias_offset(kind), words);
    }
  }

  // --- The operand of the first step: hx, read by every block for itself

  const auto operand = [&](int step) { return AFTER_BARRIERS + step % 2 * shape.operand_bytes; };
  const auto operand_tile = [&](int tile, int of_columns) {
    return (of_columns * shape.tiles + tile) * Num::BLOCKS * BLOCK_BYTES;
  };
  for (int at = thread; at < shape.tiles * COLUMN_TILES * 64; at += CLUSTER_THREADS) {
    const int tile = at / 64 / COLUMN_TILES, of_columns = at / 64 % COLUMN_TILES;
    const int row = b0 + of_columns * COLUMNS + at % 64 / 8, low = tile * TILE + Num::pair_of(at % 8);
    const auto hx = static_cast<const Stored*>(loop.hx) + (int64_t(direction) * loop.B + row) * H;
    const float first = row < loop.B && low < H ? Num::widen(load_constant(hx + low)) : 0;
    const float second = row < loop.B && low + 8 < H ? Num::widen(load_constant(hx + low + 8)) : 0;
    uint32_t words[Num::PAIR_WORDS];
    Num::to_operand(first, second, words);
    store_shared(operand(0) + operand_tile(tile, of_columns) + Num::pair_offset(at % 64 / 8, Num::pair_of(at % 8)),
                 words);
  }

  const auto barrier = [&](int step) { return step % 2 * 8; };
  if (thread == 0) {
    barrier_init(barrier(0), 1);
    barrier_init(barrier(1), 1);
    barrier_init_fence();
    barrier_arrive_and_expect(barrier(1), shape.operand_bytes);
    barrier_arrive_and_expect(barrier(0), shape.operand_bytes);
  }
  sync_cluster();

  // --- The steps

  // A step's projection is loaded at the end of the step before, and comes while h is on its way.
  Stored i_gates[3][2];
  const auto row_of = [&](int step) { return first_row(loop.rows, time_of(step), loop.B) + b; };
  const auto is_active = [&](int step) { return time_of(step) < length; };
  const auto load_projection = [&](int64_t row, bool active) {
    const auto from = static_cast<const Stored*>(loop.i) + (row * D + direction) * 3 * H;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        i_gates[gate][i] = active && unit[i] < H ? load_constant(from + gate * H + unit[i]) : Stored(0);
  };
  int row = 0;
  if (steps > 0) {
    row = row_of(0);
    load_projection(row, is_active(0));
  }

  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      barrier_wait(barrier(step), (step - 1) / 2 % 2);
      if (thread == 0) barrier_arrive_and_expect(barrier(step), shape.operand_bytes);  // of step + 2
    }

    if (block_count > 0) {
      float sum[3][COLUMN_TILES][4] = {};
      const auto load_right = [&](int block, uint32_t (&right)[COLUMN_TILES][2]) {
#pragma unroll
        for (int of_columns = 0; of_columns < COLUMN_TILES; ++of_columns)
          load_shared(operand(step) + operand_tile(0, of_columns) + (first_block + block) * BLOCK_BYTES + lane * 8,
                      right[of_columns]);
      };
      const auto multiply = [&](int gate, const uint32_t (&words)[4], const uint32_t (&right)[COLUMN_TILES][2]) {
#pragma unroll
        for (int of_columns = 0; of_columns < COLUMN_TILES; ++of_columns)
          multiply_add<P>(sum[gate][of_columns], words, right[of_columns]);
      };
      // The next operand is on its way while one is multiplied with.
      uint32_t right[2][COLUMN_TILES][2];
      load_right(0, right[0]);
#pragma unroll
      for (int block = 0; block < RESIDENT; ++block) {
        if (block + 1 < block_count) load_right(block + 1, right[(block + 1) % 2]);
#pragma unroll
        for (int gate = 0; gate < 3; ++gate)
          if (block < block_count) multiply(gate, left[block][gate], right[block % 2]);
      }
#pragma unroll 1
      for (int block = RESIDENT; block < block_count; ++block) {
        if (block > RESIDENT) load_right(block, right[RESIDENT % 2]);
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
          uint32_t words[4];
          load_shared(left_offset(shape.left, block - RESIDENT, gate), words);
          multiply(gate, words, right[RESIDENT % 2]);
        }
      }
#pragma unroll
      for (int gate = 0; gate < 3; ++gate)
#pragma unroll
        for (int of_columns = 0; of_columns < COLUMN_TILES; ++of_columns) {
          uint32_t words[4];
          fragment_words(sum[gate][of_columns], words);
          store_shared(
              shape.partial + ((warp * 3 + gate) * COLUMN_TILES + of_columns) * FRAGMENT_BYTES + fragment_offset(lane),
              words);
        }
    }
    sync_threads();

    if (has_pair) {
      float g[3][2] = {}, bias[4][2];
#pragma unroll
      for (int kind = 0; kind < 4; ++kind) {
        uint32_t words[2];
        load_shared(bias_offset(kind), words);
        bias[kind][0] = float_of(words[0]), bias[kind][1] = float_of(words[1]);
      }
#pragma unroll 2
      for (int slice = 0; slice < shape.slices; ++slice)
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
          const int of_warp = own_tile * shape.slices + slice;
          uint32_t words[2];
          load_shared(shape.partial + ((of_warp * 3 + gate) * COLUMN_TILES + column_tile) * FRAGMENT_BYTES +
                          fragment_pair_offset(column, pair),
                      words);
          g[gate][0] += float_of(words[0]);
          g[gate][1] += float_of(words[1]);
        }
      const bool active = is_active(step);
      float r[2], z[2], n[2], g_n[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        g_n[i] = g[2][i] + bias[3][i];
        r[i] = sigmoid(Num::widen(i_gates[0][i]) + bias[0][i] + g[0][i]);
        z[i] = sigmoid(Num::widen(i_gates[1][i]) + bias[1][i] + g[1][i]);
        n[i] = tanh(Num::widen(i_gates[2][i]) + bias[2][i] + r[i] * g_n[i]);
        // A row that has not begun or has ended keeps its state.
        if (active) h[i] = n[i] + z[i] * (h[i] - n[i]);
      }

      if (step + 1 < steps) {
        // Neighbours put their pairs together to messages; each then sends it to some of the blocks.
        constexpr int GROUP = Num::PAIRS_PER_MESSAGE;
        uint32_t words[Num::PAIR_WORDS], message[4];
        Num::to_operand(h[0], h[1], words);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          message[i] = shuffle(words[i % Num::PAIR_WORDS], lane / GROUP * GROUP + i / Num::PAIR_WORDS);
        const uint32_t offset = operand(step + 1) + operand_tile(tile, column_tile) +
                                Num::pair_offset(column, Num::pair_of(place / GROUP * GROUP));
        for (int i = lane % GROUP; i < shape.cluster; i += GROUP) {
          // Each begins with itself, so that not all send to the same block at once.
          const int peer = rank + i < shape.cluster ? rank + i : rank + i - shape.cluster;
          send(peer, offset, message, barrier(step + 1));
        }
      }

      if (active) {
        const auto store_pair = [&](Stored* to, int end, float low, float high) {
          Stored values[2];
          Num::to_stored(low, high, values);
          if (unit[0] < end) store_global(to + unit[0], values[0]);
          if (unit[1] < end) store_global(to + unit[1], values[1]);
        };
        store_pair(static_cast<Stored*>(loop.output) + (int64_t(row) * D + direction) * H, H, h[0], h[1]);
        if (loop.gates != nullptr) {
          const int stride = shape.gate_stride;
          const auto gates = static_cast<Stored*>(loop.gates) + (int64_t(direction) * loop.N + row) * 4 * stride;
          store_pair(gates, stride, r[0], r[1]);
          store_pair(gates + stride, stride, z[0], z[1]);
          store_pair(gates + 2 * stride, stride, n[0], n[1]);
          store_pair(gates + 3 * stride, stride, g_n[0], g_n[1]);
        }
      }
      if (step + 1 < steps) {
        row = row_of(step + 1);
        load_projection(row, is_active(step + 1));
      }
    }
  }

  if (has_pair && b < loop.B) {
    const auto h_n = static_cast<Stored*>(loop.h_n) + (int64_t(direction) * loop.B + b) * H;
    Stored values[2];
    Num::to_stored(h[0], h[1], values);
    for (int i = 0; i < 2; ++i)
      if (unit[i] < H) store_global(h_n + unit[i], values[i]);
  }
  sync_cluster();
}

}  // namespace cuda
}  // namespace fastgru
