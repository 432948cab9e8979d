// The recurrence of one GRU layer, forward and backward, with W_hh spread over all multiprocessors of a GPU. With d_h
// the gradient of h':
//
//     g = h W_hh^T                                    d_n = d_h * (1 - z) * (1 - n^2)
//     r = sigmoid(i_r + b_ir + g_r + b_hr)            d_z = d_h * (h - n) * z * (1 - z)
//     z = sigmoid(i_z + b_iz + g_z + b_hz)            d_q = d_n * r
//     q = g_n + b_hn                                  d_r = d_n * q * r * (1 - r)
//     n = tanh(i_n + b_in + r * q)                    d_h of the step before:
//     h' = n + z * (h - n)                                grad_output + d_h * z + (d_r, d_z, d_q) W_hh
//
// The input projection i = x W_ih^T is computed before. types.h has every pointer and its shape. Saved for backward,
// where wanted: r, z, n, q in loop.gates.
//
// Ownership. A group of blocks, one per tile of 16 hidden units, runs 8 * COLUMN_TILES rows of the batch in one
// direction, independently of other groups. A block keeps its tile's part of W_hh in registers and shared memory: rows
// of the three gates forwards, columns backwards. Its warps divide the sum over the units into slices. One thread of 64
// per 8 columns adds the slices up for a pair (operands.cuh): two units of one column. It carries the pair's h, or
// gradient of h, in float32.
//
// Exchange. The operand of the next product, h or (d_r, d_z, d_q) of all units, lies in one of BUFFERS buffers in
// global memory. A word there is its own flag: EMPTY until its owner stores it. (No number has the bits of EMPTY: NaN
// is rounded to another pattern.) A warp polls the words of its slice.
//   - A block that has all of step s knows that every other block had all of step s - 1, from which that computed its
//   part
//     of s. So in step s each owner resets its words of step s - 1 to EMPTY, after the block barrier behind which all
//     warps of the block have their operand.
//   - The buffer is used again in step s + 3. A thread that polls a word then has seen, in step s + 2, a word of the
//   same
//     owner stored after that owner's fence of step s, and has passed a fence of its own since. So it cannot load the
//     word of step s - 1 any more; this takes four buffers. No thread waits for a fence to complete: it stands where a
//     block only waits for the others.
//   - The sums of the warps have two buffers: a warp that has its slice of the next step may run ahead of the threads
//   that
//     add up this one, but not past the block barrier of the next step.
// A step costs one block barrier and one round trip through the L2 cache. All blocks have to be resident: the launch is
// cooperative.
#pragma once

#include <algorithm>

#include "cuda/grid_primitives.cuh"
#include "pair.cuh"

namespace fastgru {
namespace cuda {

// Few threads leave more registers for weights: each needs the same registers for everything else.
constexpr int GRID_THREADS = 256;
constexpr int GRID_WARPS = GRID_THREADS / 32;
constexpr int BUFFERS = 4;
constexpr uint32_t EMPTY = 0xffffffff;
constexpr int GRID_LEFT_BYTES = 512;  // of a left operand of 16 rows and one block

// One product per step: forwards three left operands (gates) per block of the right one, backwards one, but the right
// one is the three gates long.
template <int LEFTS, int COLUMN_TILES>
struct GridTuning;
template <>
struct GridTuning<3, 1> {
  static constexpr int RESIDENT = 10, CHUNK = 5, MOST = 16;
};
template <>
struct GridTuning<3, 2> {
  static constexpr int RESIDENT = 8, CHUNK = 4, MOST = 16;
};
template <>
struct GridTuning<1, 1> {
  static constexpr int RESIDENT = 24, CHUNK = 8, MOST = 48;
};
template <>
struct GridTuning<1, 2> {
  static constexpr int RESIDENT = 24, CHUNK = 4, MOST = 48;
};

struct GridShape {
  int tiles;         // of the layer: blocks of a group
  int groups;        // of a direction
  int blocks;        // of the right operand, for 8 columns
  int slice_blocks;  // the most that a warp has of them
  int gate_stride;
  int operand_words;  // of all columns of a group
  int bias;           // offsets in shared memory, which begins with the sums of the warps
  int left;           // left operands not in registers: [block after the resident][left][warp]
  int bytes;          // of shared memory; 0: there is no such shape
};

template <int LEFTS, int COLUMN_TILES>
GridShape grid_shape(int H, int B, Precision precision) {
  using Tuning = GridTuning<LEFTS, COLUMN_TILES>;
  GridShape s{};
  s.tiles = (H + TILE - 1) / TILE;
  s.groups = (B + COLUMNS * COLUMN_TILES - 1) / (COLUMNS * COLUMN_TILES);
  s.blocks = (LEFTS == 3 ? 1 : 3) * s.tiles * blocks_per_tile(precision);
  s.slice_blocks = (s.blocks + GRID_WARPS - 1) / GRID_WARPS;
  s.gate_stride = gate_stride(H);
  s.operand_words = s.blocks * COLUMN_TILES * (BLOCK_BYTES / 4);
  s.bias = 2 * GRID_WARPS * LEFTS * COLUMN_TILES * FRAGMENT_BYTES;
  s.left = s.bias + 256;
  const int block_bytes = LEFTS * GRID_WARPS * GRID_LEFT_BYTES;
  if (s.slice_blocks <= Tuning::MOST)
    s.bytes = std::max(s.left + std::max(0, s.slice_blocks - Tuning::RESIDENT) * block_bytes,
                       std::min(Tuning::CHUNK, s.slice_blocks) * block_bytes);
  return s;
}

// The part of a warp in the product of each step.
template <Precision P, int LEFTS, int COLUMN_TILES>
struct GridProduct {
  using Tuning = GridTuning<LEFTS, COLUMN_TILES>;
  // Blocks whose left operands are in registers, a multiple of those whose right operands are.
  static constexpr int RESIDENT = Tuning::RESIDENT, CHUNK = Tuning::CHUNK;
  static_assert(RESIDENT % CHUNK == 0);

  const GridShape& shape;
  int warp, lane, first_block, block_count;
  uint32_t left[RESIDENT][LEFTS][4];

  // load(words, block, left) gathers this lane's part of a left operand.
  template <typename Load>
  FASTGRU_DEVICE GridProduct(const GridShape& shape, Load load)
      : shape(shape), warp(thread_index() / 32), lane(thread_index() % 32) {
    first_block = warp * shape.slice_blocks;
    block_count = max(0, min(shape.slice_blocks, shape.blocks - first_block));
    const auto gather = [&](int at, int from, int to) {
#pragma unroll 1
      for (int block = from; block < min(to, block_count); ++block)
#pragma unroll 1
        for (int l = 0; l < LEFTS; ++l) {
          uint32_t words[4];
          load(words, first_block + block, l);
          store_shared(left_offset(at, block - from, l), words);
        }
    };
    // A rolled loop gathers the weights through shared memory; registers need an unrolled one. Each lane reads what it
    // wrote.
#pragma unroll
    for (int from = 0; from < RESIDENT; from += CHUNK) {
      gather(0, from, min(from + CHUNK, RESIDENT));
#pragma unroll
      for (int block = from; block < from + CHUNK && block < RESIDENT; ++block)
#pragma unroll
        for (int l = 0; l < LEFTS; ++l)
          if (block < block_count) load_shared(left_offset(0, block - from, l), left[block][l]);
    }
    sync_threads();
    gather(shape.left, RESIDENT, block_count);
  }

  FASTGRU_DEVICE int left_offset(int at, int block, int l) const {
    return at + ((block * LEFTS + l) * GRID_WARPS + warp) * GRID_LEFT_BYTES + lane * 16;
  }

  // Multiplies with the operand of `step` as it arrives, and stores the sums of this warp to shared memory.
  template <typename Exchange>
  FASTGRU_DEVICE void multiply(int step, const Exchange& exchange) {
    float sum[LEFTS][COLUMN_TILES][4] = {};
    uint32_t right[CHUNK][COLUMN_TILES][2];
    const uint32_t* from = exchange.place(step) + first_block * COLUMN_TILES * (BLOCK_BYTES / 4) + lane * 2;
    const auto fetch = [&](int chunk, int i) {
      if (chunk + i < block_count)
#pragma unroll
        for (int columns = 0; columns < COLUMN_TILES; ++columns)
          load_relaxed(from + ((chunk + i) * COLUMN_TILES + columns) * (BLOCK_BYTES / 4), right[i][columns]);
    };
    const auto wait = [&](int chunk) {
      while (true) {
        bool all = true;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
#pragma unroll
          for (int columns = 0; columns < COLUMN_TILES; ++columns)
            if (chunk + i < block_count) all = all && right[i][columns][0] != EMPTY && right[i][columns][1] != EMPTY;
        if (all_lanes(all)) return;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) fetch(chunk, i);
      }
    };
    const auto multiply_block = [&](int l, int i, const uint32_t (&words)[4]) {
#pragma unroll
      for (int columns = 0; columns < COLUMN_TILES; ++columns)
        multiply_add<P>(sum[l][columns], words, right[i][columns]);
    };
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) fetch(0, i);
    // Software pipelining: a block's registers are loaded anew as soon as it has been multiplied.
#pragma unroll
    for (int chunk = 0; chunk < RESIDENT; chunk += CHUNK)
      if (chunk < block_count) {
        wait(chunk);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
          if (chunk + i < block_count)
#pragma unroll
            for (int l = 0; l < LEFTS; ++l) multiply_block(l, i, left[chunk + i][l]);
          fetch(chunk + CHUNK, i);
        }
      }
#pragma unroll 1
    for (int chunk = RESIDENT; chunk < block_count; chunk += CHUNK) {
      wait(chunk);
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        if (chunk + i < block_count)
#pragma unroll
          for (int l = 0; l < LEFTS; ++l) {
            uint32_t words[4];
            load_shared(left_offset(shape.left, chunk + i - RESIDENT, l), words);
            multiply_block(l, i, words);
          }
        fetch(chunk + CHUNK, i);
      }
    }
#pragma unroll
    for (int l = 0; l < LEFTS; ++l)
#pragma unroll
      for (int columns = 0; columns < COLUMN_TILES; ++columns) {
        uint32_t words[4];
        fragment_words(sum[l][columns], words);
        store_shared(sum_offset(step, warp, l, columns) + fragment_offset(lane), words);
      }
  }

  static FASTGRU_DEVICE uint32_t sum_offset(int step, int warp, int l, int columns) {
    return (((step % 2 * GRID_WARPS + warp) * LEFTS + l) * COLUMN_TILES + columns) * FRAGMENT_BYTES;
  }

  // Adds up the sums of all warps for a pair.
  static FASTGRU_DEVICE void collect(int step, int column_tile, int column, int pair, float (&total)[LEFTS][2]) {
#pragma unroll
    for (int l = 0; l < LEFTS; ++l) total[l][0] = total[l][1] = 0;
#pragma unroll 2
    for (int warp = 0; warp < GRID_WARPS; ++warp)
#pragma unroll
      for (int l = 0; l < LEFTS; ++l) {
        uint32_t words[2];
        load_shared(sum_offset(step, warp, l, column_tile) + fragment_pair_offset(column, pair), words);
        total[l][0] += float_of(words[0]);
        total[l][1] += float_of(words[1]);
      }
  }
};

// The exchange of a group: BUFFERS places of shape.operand_words words.
template <Precision P, int LEFTS, int COLUMN_TILES>
struct GridExchange {
  using Num = Numbers<P>;

  const GridShape& shape;
  uint32_t* words;  // of this group

  FASTGRU_DEVICE uint32_t* place(int step) const { return words + int64_t(step % BUFFERS) * shape.operand_words; }

  // Where `index`, a tile of h, or a tile of one of the gates, has a pair. Blocks lie one after the other, each for all
  // columns.
  FASTGRU_DEVICE int pair_at(int index, int column_tile, int column, int pair) const {
    const int half = Num::BLOCKS == 2 ? pair / 4 : 0, within = Num::pair_offset(column, pair) - half * BLOCK_BYTES;
    return (((index * Num::BLOCKS + half) * COLUMN_TILES + column_tile) * BLOCK_BYTES + within) / 4;
  }

  FASTGRU_DEVICE void set(int step, int at, float low, float high) const {
    uint32_t pair[Num::PAIR_WORDS];
    Num::to_operand(low, high, pair);
    store_relaxed(place(step) + at, pair);
  }

  FASTGRU_DEVICE void clear(int step, int at) const {
    uint32_t pair[Num::PAIR_WORDS];
#pragma unroll
    for (int i = 0; i < Num::PAIR_WORDS; ++i) pair[i] = EMPTY;
    store_relaxed(place(step) + at, pair);
  }
};

// The indices of a thread: its block, its group, and the pair that it owns.
template <Precision P, int COLUMN_TILES>
struct GridThread {
  int direction, group, tile;
  int column_tile, column, pair, unit[2];
  int b0, b;  // batch rows: the group's first, the pair's
  bool has_pair;

  FASTGRU_DEVICE GridThread(const GridShape& shape, int first_direction) {
    direction = first_direction + block_index_y();
    group = block_index_x() / shape.tiles, tile = block_index_x() % shape.tiles;
    const int thread = thread_index();
    column_tile = thread / 64, column = thread % 64 / 8, pair = Numbers<P>::pair_of(thread % 8);
    has_pair = column_tile < COLUMN_TILES;
    unit[0] = tile * TILE + pair, unit[1] = unit[0] + 8;
    b0 = group * COLUMNS * COLUMN_TILES, b = b0 + column_tile * COLUMNS + column;
  }
};

// `exchange`: [D][group][BUFFERS][operand], all EMPTY.
template <Precision P, int COLUMN_TILES>
FASTGRU_DEVICE void gru_grid_forward_block(const GruForwardLoop& loop, const GridShape& shape, int first_direction,
                                           uint32_t* exchange) {
  using Num = Numbers<P>;
  using Stored = typename Num::Stored;
  using Product = GridProduct<P, 3, COLUMN_TILES>;
  const int H = loop.H;
  const GridThread<P, COLUMN_TILES> own(shape, first_direction);
  const int direction = own.direction, b = own.b;
  const GridExchange<P, 3, COLUMN_TILES> all{
      shape, exchange + int64_t(direction * shape.groups + own.group) * BUFFERS * shape.operand_words};
  // Rows are sorted by length: the first of the group is the longest.
  const int steps = row_steps(loop.table, loop.T, own.b0);
  const int length = own.has_pair && b < loop.B ? row_steps(loop.table, loop.T, b) : 0;
  const auto time_of = [&](int step) { return direction == 0 ? step : steps - 1 - step; };

  const auto w_hh = static_cast<const Stored*>(loop.w_hh) + int64_t(direction) * 3 * H * H;
  Product product(shape, [&](uint32_t (&words)[4], int block, int gate) {
    Num::load_left(words, thread_index() % 32, block, [&](int row, int k) {
      const int out = own.tile * TILE + row;
      return out < H && k < H ? load_constant(w_hh + int64_t(gate * H + out) * H + k) : Stored(0);
    });
  });

  const int at = all.pair_at(own.tile, own.column_tile, own.column, own.pair);
  float h[2] = {0, 0};
  if (own.has_pair) {
    const auto hx = static_cast<const Stored*>(loop.hx) + (int64_t(direction) * loop.B + b) * H;
    for (int i = 0; i < 2; ++i)
      if (b < loop.B && own.unit[i] < H) h[i] = Num::widen(load_constant(hx + own.unit[i]));
    all.set(0, at, h[0], h[1]);
  }

  const auto bias_offset = [&](int kind) { return shape.bias + (kind * 8 + own.pair) * 8; };
  if (own.has_pair && own.column_tile == 0 && own.column == 0)
    for (int kind = 0; kind < 4; ++kind) {
      uint32_t words[2];
      load_bias<P>(loop, direction, own.unit, kind, words);
      store_shared(bias_offset(kind), words);
    }

  // A step's projection is loaded as soon as the one before has been used, most of a step ahead.
  Stored i_gates[3][2];
  const auto token_of = [&](int step) { return first_token(loop.table, time_of(min(step, steps - 1)), loop.B) + b; };
  const auto is_active = [&](int step) { return step < steps && time_of(step) < length; };
  int token = token_of(0), next_token = token_of(1);
  load_projection<P>(loop, direction, own.unit, token, is_active(0), i_gates);

  for (int step = 0; step < steps; ++step) {
    product.multiply(step, all);
    sync_threads();

    Gates gates;
    const bool active = is_active(step);
    if (own.has_pair) {
      float g[3][2];
      Product::collect(step, own.column_tile, own.column, own.pair, g);
      gates = compute_gates<P>(i_gates, g, bias_offset, active, h);
      if (step + 1 < steps) all.set(step + 1, at, h[0], h[1]);
      if (step > 0 && step + 3 < steps) all.clear(step - 1, at);
    }
    fence_gpu();
    if (own.has_pair) {
      load_projection<P>(loop, direction, own.unit, next_token, is_active(step + 1), i_gates);
      if (active) store_state<P>(loop, direction, own.unit, token, shape.gate_stride, h, gates);
    }
    token = next_token;
    next_token = token_of(step + 2);
  }

  if (own.has_pair && b < loop.B)
    store_pair<P>(own.unit, static_cast<Stored*>(loop.h_n) + (int64_t(direction) * loop.B + b) * H, H, h[0], h[1]);
}

template <Precision P, int COLUMN_TILES>
FASTGRU_DEVICE void gru_grid_backward_block(const GruBackwardLoop& loop, const GridShape& shape, int first_direction,
                                            uint32_t* exchange) {
  using Num = Numbers<P>;
  using Stored = typename Num::Stored;
  using Product = GridProduct<P, 1, COLUMN_TILES>;
  const int H = loop.H;
  const GridThread<P, COLUMN_TILES> own(shape, first_direction);
  const int direction = own.direction, b = own.b;
  const GridExchange<P, 1, COLUMN_TILES> all{
      shape, exchange + int64_t(direction * shape.groups + own.group) * BUFFERS * shape.operand_words};
  const int steps = row_steps(loop.table, loop.T, own.b0);
  const int length = own.has_pair && b < loop.B ? row_steps(loop.table, loop.T, b) : 0;
  const auto time_of = [&](int step) { return direction == 0 ? steps - 1 - step : step; };

  // Of W_hh^T: the rows are the tile's units, the sum is over the units of the gates, one gate after the other.
  const auto w_hh = static_cast<const Stored*>(loop.w_hh) + int64_t(direction) * 3 * H * H;
  const int gate_blocks = shape.blocks / 3;
  Product product(shape, [&](uint32_t (&words)[4], int block, int) {
    Num::load_left(words, thread_index() % 32, block % gate_blocks, [&](int row, int k) {
      const int out = own.tile * TILE + row;
      return out < H && k < H ? load_constant(w_hh + int64_t(block / gate_blocks * H + k) * H + out) : Stored(0);
    });
  });

  // The gradient of h, without the product of the current step.
  float carry[2] = {0, 0};
  if (own.has_pair && b < loop.B && loop.grad_h_n != nullptr) {
    const auto from = static_cast<const Stored*>(loop.grad_h_n) + (int64_t(direction) * loop.B + b) * H;
    for (int i = 0; i < 2; ++i)
      if (own.unit[i] < H) carry[i] = Num::widen(load_constant(from + own.unit[i]));
  }

  // The saved values of a step are loaded most of a step ahead.
  Saved<P> saved;
  const auto token_of = [&](int step) { return first_token(loop.table, time_of(min(step, steps - 1)), loop.B) + b; };
  const auto is_active = [&](int step) { return step < steps && time_of(step) < length; };
  const auto load_step = [&](int64_t token, bool active) {
    load_saved(loop, direction, own.unit, token, active, shape.gate_stride, saved);
  };
  int token = token_of(0), next_token = token_of(1);
  load_step(token, is_active(0));

  // The gradients of the gates of a step, for the other blocks and for the products after the recurrence.
  float d[4][2];
  const auto begin_step = [&](int step) {
    const bool active = is_active(step);
    compute_gradients(saved, active, carry, d);
#pragma unroll
    for (int gate = 0; gate < 3; ++gate)
      all.set(step, all.pair_at(gate * shape.tiles + own.tile, own.column_tile, own.column, own.pair),
              active ? d[gate == 2 ? 3 : gate][0] : 0, active ? d[gate == 2 ? 3 : gate][1] : 0);
  };
  const auto store_step = [&](bool active) {
    if (active) store_gradients<P>(loop, direction, own.unit, token, d);
  };
  if (own.has_pair) {
    begin_step(0);
    load_step(next_token, is_active(1));
    store_step(is_active(0));
  }

  for (int step = 0; step < steps; ++step) {
    product.multiply(step, all);
    sync_threads();

    token = next_token;
    next_token = token_of(step + 2);
    if (own.has_pair) {
      float through[1][2];
      Product::collect(step, own.column_tile, own.column, own.pair, through);
      carry[0] += through[0][0], carry[1] += through[0][1];
      if (step + 1 < steps) begin_step(step + 1);
      if (step > 0 && step + 3 < steps)
        for (int gate = 0; gate < 3; ++gate)
          all.clear(step - 1, all.pair_at(gate * shape.tiles + own.tile, own.column_tile, own.column, own.pair));
    }
    fence_gpu();
    if (own.has_pair && step + 1 < steps) {
      load_step(next_token, is_active(step + 2));
      store_step(is_active(step + 1));
    }
  }

  if (own.has_pair && b < loop.B)
    store_pair<P>(own.unit, static_cast<Stored*>(loop.grad_hx) + (int64_t(direction) * loop.B + b) * H, H, carry[0],
                  carry[1]);
}

}  // namespace cuda
}  // namespace fastgru
