// Backward recurrence of one GRU layer, W_hh resident in a cluster of blocks. For each step, last to first, with t the
// gradient of the state h' that the step computed from h:
//
//     d_n = t * (1 - z) * (1 - n^2)                   d_z = t * (h - n) * z * (1 - z)
//     d_r = d_n * (g_n + b_hn) * r * (1 - r)          d_g = d_n * r
//     t of the step before = grad_output + t * z + (d_r, d_z, d_g) W_hh
//
// GruBackwardLoop has every pointer. r, z, n and g_n + b_hn were saved by forward; the gradients of the gates are what
// the products after the loop need.
//
// Who owns what. As forwards, a cluster runs 8 * COLUMN_TILES rows of the batch in one direction and a block owns tiles
// of 16 hidden units; one thread of 64 per tile and 8 columns computes two units of one column and carries their
// gradient in float32. The product sums over the gates of all units. A block does its own units' share of that sum, for
// all H results, from the rows of W_hh it owns, and sends each block the part that is of that block's units: a
// reduce-scatter. The other way, sending gate gradients to everybody, takes 3H numbers of 16 bits per column and block
// instead of H of 32, and sums within the block on top.
//
// The exchange. A warp multiplies for up to four tiles of grad_h, and its lanes send their sums, 16 bytes each, into
// the slot that the receiver has for the sender; the receiver adds the slots up by rank, so the order of arrival does
// not show in the result. Exchange e, which ends step e, goes to slots e % 2 and is counted down by barrier e % 2.
//   - A message of exchange e overwrites what was read before exchange e - 1: its sender's threads have passed the
//   block
//     barrier of step e, behind its gate threads, which had waited for exchange e - 1, so for sums of the receiver that
//     its warps computed behind its block barrier of step e - 1, behind the reads of exchange e - 2 there.
//   - For the same reason no message of exchange e + 2 comes before exchange e is over.
//   - The gate gradients, as operand of the block's own product, are double-buffered because a warp may still read
//     those of step e when exchange e is over: what it computes is for another block.
//   - The last exchange is waited for as all others are, so all that was sent has arrived at the end.
// So again a step pays for one block barrier and one message.
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
  // Through shared memory into registers, as forwards.
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

  // The gradient of the pair's state: of the state that step `step` computed, without grad_output.
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

  // What a step needs from memory is loaded as soon as that of the step before has been used.
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
      // The next operand is on its way while one is multiplied with.
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
