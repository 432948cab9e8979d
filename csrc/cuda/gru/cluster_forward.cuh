// The forward recurrence of one GRU layer, with W_hh resident in a cluster of blocks. For each step:
//
//     g = h W_hh^T                                    r = sigmoid(i_r + b_ir + g_r + b_hr)
//     z = sigmoid(i_z + b_iz + g_z + b_hz)            q = g_n + b_hn
//     n = tanh(i_n + b_in + r * q)                    h' = n + z * (h - n)
//
// The input projection i = x W_ih^T is computed before. GruForwardLoop (types.h) has every pointer and its shape. Saved
// for backward, where wanted: r, z, n, q in loop.gates.
//
// Ownership. A cluster runs 8 * COLUMN_TILES rows of the batch in one direction, independently of other clusters. A
// block owns tiles of 16 hidden units and keeps their rows of W_hh, of all three gates, in registers and shared memory.
// A warp multiplies the three gates of one tile with a slice of h, so that r, z and n of a unit meet in one block. Of
// the 64 threads per tile and 8 columns, each adds up the slices for one pair: two units of one column. It carries the
// pair's h in float32.
//
// Exchange. Every block holds all of h, the operand of the product, in two buffers. Step s reads buffer s % 2; its
// result is sent to buffer (s + 1) % 2 of every block, its own included. Messages have 16 bytes and count down the
// buffer's barrier; one phase of the barrier is the arrival of all of h.
//   - A message for step s + 1 overwrites the operand of step s - 1. Its sender has all of h for step s, the receiver's
//     part included. The receiver computed that part in step s - 1, after a block barrier behind which all its warps
//     had read their operand. This needs every block to own a tile.
//   - By the same argument no message of the phase after the next arrives before the next phase has ended. Messages may
//     arrive before the barrier expects their bytes.
//   - The sums of the warps are overwritten in step s + 1 by warps that have all of h, their own block's part included,
//     hence after the sums of step s were read.
//   - The last step sends nothing, so at the end all messages have arrived. The closing cluster barrier keeps every
//   block
//     alive without relying on this argument.
// A step costs one block barrier and the latency of one message; no cluster barrier stands in the loop.
#pragma once

#include "cluster_shape.h"
#include "cluster_thread.cuh"

namespace fastgru {
namespace cuda {

template <Precision P, int COLUMN_TILES>
FASTGRU_DEVICE void gru_cluster_forward_block(const GruForwardLoop& loop, const ForwardShape& shape) {
  using Num = Numbers<P>;
  using Stored = typename Num::Stored;
  constexpr int RESIDENT = FORWARD_RESIDENT<COLUMN_TILES>;
  const ClusterThread<P, COLUMN_TILES> own(loop, shape);
  const int thread = own.thread, warp = own.warp, lane = own.lane, rank = own.rank, direction = own.direction;
  const int H = loop.H, b = own.b, steps = own.steps;
  const auto time_of = [&](int step) { return direction == 0 ? step : steps - 1 - step; };

  // --- Weights of this warp

  const auto w_hh = static_cast<const Stored*>(loop.w_hh) + int64_t(direction) * 3 * H * H;
  const int warp_tile = warp / shape.slices, first_block = warp % shape.slices * shape.slice_blocks;
  const int block_count = warp_tile < own.tiles ? min(shape.slice_blocks, shape.tiles * Num::BLOCKS - first_block) : 0;
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
  // Weights for registers pass through shared memory, which is still unused: a rolled loop can then gather them, where
  // registers need an unrolled one. Each lane reads what it wrote.
  uint32_t left[RESIDENT][3][4];
  gather(0, 0, min(RESIDENT, block_count));
#pragma unroll
  for (int block = 0; block < RESIDENT; ++block)
#pragma unroll
    for (int gate = 0; gate < 3; ++gate)
      if (block < block_count) load_shared(left_offset(0, block, gate), left[block][gate]);
  sync_threads();
  gather(shape.left, RESIDENT, block_count);

  // --- Initial state and biases of the pair

  float h[2] = {0, 0};
  if (own.has_pair && b < loop.B) {
    const auto hx = static_cast<const Stored*>(loop.hx) + (int64_t(direction) * loop.B + b) * H;
    for (int i = 0; i < 2; ++i)
      if (own.unit[i] < H) h[i] = Num::widen(load_constant(hx + own.unit[i]));
  }

  const auto bias_offset = [&](int kind) {
    return shape.bias + ((kind * CLUSTER_WARPS / 2 + own.index) * 8 + own.pair) * 8;
  };
  if (own.has_pair && own.column_tile == 0 && own.column == 0)
    for (int kind = 0; kind < 4; ++kind) {
      uint32_t words[2];
      load_bias<P>(loop, direction, own.unit, kind, words);
      store_shared(bias_offset(kind), words);
    }

  // --- The operand of the first step: hx, read by every block for itself

  const auto operand = [&](int step) { return AFTER_BARRIERS + step % 2 * shape.operand_bytes; };
  const auto operand_tile = [&](int tile, int of_columns) {
    return (of_columns * shape.tiles + tile) * Num::BLOCKS * BLOCK_BYTES;
  };
  for (int at = thread; at < shape.tiles * COLUMN_TILES * 64; at += CLUSTER_THREADS) {
    const int tile = at / 64 / COLUMN_TILES, of_columns = at / 64 % COLUMN_TILES;
    const int row = own.b0 + of_columns * COLUMNS + at % 64 / 8, low = tile * TILE + Num::pair_of(at % 8);
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

  // A step's projection is loaded at the end of the step before, while h is being exchanged.
  Stored i_gates[3][2];
  const auto token_of = [&](int step) { return first_token(loop.table, time_of(step), loop.B) + b; };
  const auto is_active = [&](int step) { return time_of(step) < own.length; };
  int token = 0;
  if (steps > 0) {
    token = token_of(0);
    load_projection<P>(loop, direction, own.unit, token, is_active(0), i_gates);
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
      // Software pipelining: the next right operand is loaded while this one is multiplied.
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

    if (own.has_pair) {
      float g[3][2] = {};
#pragma unroll 2
      for (int slice = 0; slice < shape.slices; ++slice)
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
          const int of_warp = own.index * shape.slices + slice;
          uint32_t words[2];
          load_shared(shape.partial + ((of_warp * 3 + gate) * COLUMN_TILES + own.column_tile) * FRAGMENT_BYTES +
                          fragment_pair_offset(own.column, own.pair),
                      words);
          g[gate][0] += float_of(words[0]);
          g[gate][1] += float_of(words[1]);
        }
      const bool active = is_active(step);
      const Gates gates = compute_gates<P>(i_gates, g, bias_offset, active, h);

      if (step + 1 < steps) {
        // Neighbouring lanes combine their pairs into one message; each lane sends it to some of the blocks.
        constexpr int GROUP = Num::PAIRS_PER_MESSAGE;
        uint32_t words[Num::PAIR_WORDS], message[4];
        Num::to_operand(h[0], h[1], words);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          message[i] = shuffle(words[i % Num::PAIR_WORDS], lane / GROUP * GROUP + i / Num::PAIR_WORDS);
        const uint32_t offset = operand(step + 1) + operand_tile(own.tile, own.column_tile) +
                                Num::pair_offset(own.column, Num::pair_of(own.place / GROUP * GROUP));
        for (int i = lane % GROUP; i < shape.cluster; i += GROUP) {
          // Each block begins with itself, so that not all send to the same block at once.
          const int peer = rank + i < shape.cluster ? rank + i : rank + i - shape.cluster;
          send(peer, offset, message, barrier(step + 1));
        }
      }

      if (active) store_state<P>(loop, direction, own.unit, token, shape.gate_stride, h, gates);
      if (step + 1 < steps) {
        token = token_of(step + 1);
        load_projection<P>(loop, direction, own.unit, token, is_active(step + 1), i_gates);
      }
    }
  }

  if (own.has_pair && b < loop.B)
    store_pair<P>(own.unit, static_cast<Stored*>(loop.h_n) + (int64_t(direction) * loop.B + b) * H, H, h[0], h[1]);
  sync_cluster();
}

}  // namespace cuda
}  // namespace fastgru
