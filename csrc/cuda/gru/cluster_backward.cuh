// The backward recurrence of one GRU layer, with W_hh resident in a cluster of blocks. For each step, last to first,
// with d_h the gradient of the state h' that the step computed from h:
//
//     d_n = d_h * (1 - z) * (1 - n^2)                 d_z = d_h * (h - n) * z * (1 - z)
//     d_q = d_n * r                                   d_r = d_n * q * r * (1 - r)
//     d_h of the step before = grad_output + d_h * z + (d_r, d_z, d_q) W_hh
//
// GruBackwardLoop (types.h) has every pointer and its shape. The forward pass saved r, z, n, q in loop.gates. The
// products after the recurrence need the gradients of the gates, loop.grad_gates.
//
// Ownership. As in the forward pass a cluster runs 8 * COLUMN_TILES rows of the batch in one direction, a block owns
// tiles of 16 hidden units, and one thread of 64 per tile and 8 columns computes a pair and carries its gradient in
// float32. The product sums over the gates of all units. A block computes the share of its own units in that sum, for
// all H results, from its rows of W_hh, and sends each block the results of that block's units: a reduce-scatter.
// Sending the gate gradients to all blocks instead takes 3H numbers of 16 bits per column and block, not H of 32, and a
// sum over all units in every block.
//
// Exchange. A warp multiplies for up to four tiles of the result, and its lanes send their sums, 16 bytes each, to the
// slot that the receiver has for the sender. The receiver adds the slots up by rank, so that the result does not depend
// on the order of arrival. Exchange e, which ends step e, uses slots e % 2 and barrier e % 2.
//   - A message of exchange e overwrites sums of exchange e - 2. Its sender has passed the block barrier of step e, so
//   its
//     threads had received exchange e - 1, the receiver's sums included. The receiver computed those after its block
//     barrier of step e - 1, which comes after its reads of exchange e - 2.
//   - By the same argument no message of exchange e + 2 arrives before exchange e is over.
//   - The gate gradients, operand of the block's own product, have two buffers: a warp may still read those of step e
//   when
//     exchange e is over, because it computes results for another block.
//   - All exchanges are waited for, the last one included, so at the end all messages have arrived.
// A step costs one block barrier and the latency of one message.
#pragma once

#include "cluster_shape.h"
#include "cluster_thread.cuh"

namespace fastgru {
namespace cuda {

template <Precision P, int COLUMN_TILES>
FASTGRU_DEVICE void gru_cluster_backward_block(const GruBackwardLoop& loop, const BackwardShape& shape) {
  using Num = Numbers<P>;
  using Stored = typename Num::Stored;
  constexpr int RESIDENT = BACKWARD_RESIDENT<COLUMN_TILES>;
  const ClusterThread<P, COLUMN_TILES> own(loop, shape);
  const int thread = own.thread, warp = own.warp, lane = own.lane, rank = own.rank, direction = own.direction;
  const int H = loop.H, b = own.b, steps = own.steps;
  const auto time_of = [&](int step) { return direction == 0 ? steps - 1 - step : step; };

  // --- Weights of this warp: rows of W_hh of the block's units, columns of the warp's tiles of grad_h

  const auto w_hh = static_cast<const Stored*>(loop.w_hh) + int64_t(direction) * 3 * H * H;
  const int first_tile = warp * shape.warp_tiles;
  const int tile_count = max(0, min(shape.warp_tiles, shape.tiles - first_tile));
  const int block_count = 3 * own.tiles * Num::BLOCKS;
  const auto left_offset = [&](int at, int block, int i) {
    return at + ((block * shape.warp_tiles + i) * shape.warps + warp) * LEFT_BYTES + lane * 16;
  };
  const auto gather = [&](int at, int from, int to) {
    for (int block = from; block < to; ++block)
      for (int i = 0; i < tile_count; ++i) {
        const int gate = block / Num::BLOCKS / own.tiles, of_tile = block / Num::BLOCKS % own.tiles;
        uint32_t words[4];
        Num::load_left(words, lane, block % Num::BLOCKS, [&](int row, int k) {
          const int out = (first_tile + i) * TILE + row, in = (rank + of_tile * shape.cluster) * TILE + k;
          return out < H && in < H ? load_constant(w_hh + int64_t(gate * H + in) * H + out) : Stored(0);
        });
        store_shared(left_offset(at, block - from, i), words);
      }
  };
  // Weights for registers pass through shared memory, as in the forward pass.
  uint32_t left[RESIDENT][BACKWARD_TILES][4];
  gather(0, 0, min(RESIDENT, block_count));
#pragma unroll
  for (int block = 0; block < RESIDENT; ++block)
#pragma unroll
    for (int i = 0; i < BACKWARD_TILES; ++i)
      if (block < block_count && i < tile_count) load_shared(left_offset(0, block, i), left[block][i]);
  sync_threads();
  gather(shape.left, RESIDENT, block_count);

  const auto barrier = [&](int exchange) { return exchange % 2 * 8; };
  const int expected = shape.cluster * own.tiles * COLUMN_TILES * FRAGMENT_BYTES;
  if (thread == 0) {
    barrier_init(barrier(0), 1);
    barrier_init(barrier(1), 1);
    barrier_init_fence();
    barrier_arrive_and_expect(barrier(0), expected);
    barrier_arrive_and_expect(barrier(1), expected);
  }
  sync_cluster();

  // --- The steps

  // The gradient of the pair's state, without grad_output.
  float carry[2] = {0, 0};
  const auto state_at = [&](int i) { return (int64_t(direction) * loop.B + b) * H + own.unit[i]; };
  if (own.has_pair && b < loop.B && loop.grad_h_n != nullptr)
    for (int i = 0; i < 2; ++i)
      if (own.unit[i] < H)
        carry[i] = Num::widen(load_constant(static_cast<const Stored*>(loop.grad_h_n) + state_at(i)));

  const auto receive = [&](int exchange) {
    barrier_wait(barrier(exchange), exchange / 2 % 2);
    if (thread == 0) barrier_arrive_and_expect(barrier(exchange), expected);  // of exchange + 2
    const int at = shape.sums + exchange % 2 * shape.sums_bytes +
                   (own.index * COLUMN_TILES + own.column_tile) * FRAGMENT_BYTES +
                   fragment_pair_offset(own.column, own.pair);
#pragma unroll 4
    for (int from = 0; from < shape.cluster; ++from) {
      uint32_t words[2];
      load_shared(at + from * shape.most * COLUMN_TILES * FRAGMENT_BYTES, words);
      carry[0] += float_of(words[0]);
      carry[1] += float_of(words[1]);
    }
  };

  // The saved values of a step are loaded as soon as those of the step before have been used.
  Saved<P> saved;
  const auto token_of = [&](int step) { return first_token(loop.table, time_of(step), loop.B) + b; };
  const auto is_active = [&](int step) { return time_of(step) < own.length; };
  const auto load_step = [&](int64_t token, bool active) {
    load_saved(loop, direction, own.unit, token, active, shape.gate_stride, saved);
  };
  int token = 0;
  if (steps > 0) {
    token = token_of(0);
    load_step(token, is_active(0));
  }

  for (int step = 0; step < steps; ++step) {
    const int operand = AFTER_BARRIERS + step % 2 * shape.operand_bytes;
    const bool active = is_active(step);
    if (own.has_pair) {
      if (step > 0) receive(step - 1);
      float d[4][2];
      compute_gradients(saved, active, carry, d);
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        const int kind = gate < 2 ? gate : 3;
        uint32_t words[Num::PAIR_WORDS];
        Num::to_operand(active ? d[kind][0] : 0, active ? d[kind][1] : 0, words);
        store_shared(operand + ((own.column_tile * 3 + gate) * own.tiles + own.index) * Num::BLOCKS * BLOCK_BYTES +
                         Num::pair_offset(own.column, own.pair),
                     words);
      }
      if (active) store_gradients<P>(loop, direction, own.unit, token, d);
      if (step + 1 < steps) {
        token = token_of(step + 1);
        load_step(token, is_active(step + 1));
      }
    }
    sync_threads();

    if (tile_count > 0) {
      float sum[BACKWARD_TILES][COLUMN_TILES][4] = {};
      const auto load_right = [&](int block, uint32_t (&right)[COLUMN_TILES][2]) {
#pragma unroll
        for (int of_columns = 0; of_columns < COLUMN_TILES; ++of_columns)
          load_shared(operand + (of_columns * block_count + block) * BLOCK_BYTES + lane * 8, right[of_columns]);
      };
      const auto multiply = [&](int i, const uint32_t (&words)[4], const uint32_t (&right)[COLUMN_TILES][2]) {
#pragma unroll
        for (int of_columns = 0; of_columns < COLUMN_TILES; ++of_columns)
          multiply_add<P>(sum[i][of_columns], words, right[of_columns]);
      };
      // Software pipelining: the next right operand is loaded while this one is multiplied.
      uint32_t right[2][COLUMN_TILES][2];
      load_right(0, right[0]);
#pragma unroll
      for (int block = 0; block < RESIDENT; ++block) {
        if (block + 1 < block_count) load_right(block + 1, right[(block + 1) % 2]);
#pragma unroll
        for (int i = 0; i < BACKWARD_TILES; ++i)
          if (block < block_count && i < tile_count) multiply(i, left[block][i], right[block % 2]);
      }
#pragma unroll 1
      for (int block = RESIDENT; block < block_count; ++block) {
        if (block > RESIDENT) load_right(block, right[RESIDENT % 2]);
#pragma unroll
        for (int i = 0; i < BACKWARD_TILES; ++i) {
          if (i >= tile_count) break;
          uint32_t words[4];
          load_shared(left_offset(shape.left, block - RESIDENT, i), words);
          multiply(i, words, right[RESIDENT % 2]);
        }
      }
      int peer = first_tile % shape.cluster, of_peer = first_tile / shape.cluster;
#pragma unroll
      for (int i = 0; i < BACKWARD_TILES; ++i) {
        if (i >= tile_count) break;
#pragma unroll
        for (int of_columns = 0; of_columns < COLUMN_TILES; ++of_columns) {
          uint32_t words[4];
          fragment_words(sum[i][of_columns], words);
          const int fragment = (rank * shape.most + of_peer) * COLUMN_TILES + of_columns;
          send(peer, shape.sums + step % 2 * shape.sums_bytes + fragment * FRAGMENT_BYTES + fragment_offset(lane),
               words, barrier(step));
        }
        if (++peer == shape.cluster) peer = 0, ++of_peer;
      }
    }
  }

  if (own.has_pair) {
    if (steps > 0) receive(steps - 1);
    if (b < loop.B)
      store_pair<P>(own.unit, static_cast<Stored*>(loop.grad_hx) + (int64_t(direction) * loop.B + b) * H, H, carry[0],
                    carry[1]);
  }
  sync_cluster();
}

}  // namespace cuda
}  // namespace fastgru
