// Divides a layer among the blocks of a cluster and the warps of a block, and lays out their shared memory.
//
// A cluster has one copy of W_hh and runs 8 or 16 rows of the batch ("columns", see operands.cuh). The tiles of 16
// hidden units are assigned round-robin: the block of rank r has tiles r, r + cluster, ..., in all three gates. Every
// block gets at least one, because the exchange relies on hearing from all blocks in every step. Weights that do not
// fit in registers are read from shared memory in each step.
#pragma once

#include <algorithm>

#include "operands.cuh"

namespace fastgru {
namespace cuda {

constexpr int CLUSTER_THREADS = 384;
constexpr int CLUSTER_WARPS = CLUSTER_THREADS / 32;
// Blocks of left operands that a warp has in registers, 4 per thread for each 16 rows: forwards those of the three
// gates, backwards those of BACKWARD_TILES tiles. The others are in shared memory. The more columns, the more registers
// hold sums.
template <int COLUMN_TILES>
constexpr int FORWARD_RESIDENT = COLUMN_TILES == 1 ? 8 : 6;
template <int COLUMN_TILES>
constexpr int BACKWARD_RESIDENT = COLUMN_TILES == 1 ? 6 : 4;
constexpr int BACKWARD_TILES = 4;
constexpr int LEFT_BYTES = 512;

// Dynamic shared memory of a block, at the most, on compute capability 9.0.
constexpr int SHARED_BYTES = 227 * 1024;
// Shared memory begins with two barriers; the rest follows at this offset.
constexpr int AFTER_BARRIERS = 128;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct ForwardShape {
  int cluster;
  int tiles;         // of the layer
  int slices;        // warps that share a tile's products, each with some of the blocks of h
  int warps;         // that multiply: those of a block's first tile, those of its second, ...
  int slice_blocks;  // the most blocks that one of them has
  int gate_stride;
  int operand_bytes;  // h of all units; there are two, at AFTER_BARRIERS
  int partial;        // offset of the sums of the warps, fragments [warp][gate][column tile]
  int bias;           // offset of the biases, 8 bytes each: [kind][CLUSTER_WARPS / 2][pair]
  int left;           // offset of the left operands not in registers, [block after the resident][gate][warp]
  int bytes;          // of shared memory; 0: there is no such shape
};

inline ForwardShape forward_shape(int H, Precision precision, int cluster, int column_tiles) {
  ForwardShape s{};
  s.cluster = cluster;
  s.tiles = ceil_div(H, TILE);
  s.gate_stride = gate_stride(H);
  const int most = ceil_div(s.tiles, cluster);
  // A thread has one pair, so that 64 threads are needed for each tile and 8 columns.
  if (s.tiles < cluster || most * column_tiles * 64 > CLUSTER_THREADS) return s;
  const int blocks = s.tiles * blocks_per_tile(precision);
  // A warp with fewer than four blocks saves less than the longer sum of partial results costs.
  s.slices = std::min(CLUSTER_WARPS / most, std::max(1, blocks / 4));
  s.slice_blocks = ceil_div(blocks, s.slices);
  s.slices = ceil_div(blocks, s.slice_blocks);
  s.warps = most * s.slices;
  s.operand_bytes = blocks * column_tiles * BLOCK_BYTES;
  s.partial = AFTER_BARRIERS + 2 * s.operand_bytes;
  s.bias = s.partial + s.warps * 3 * column_tiles * FRAGMENT_BYTES;
  s.left = s.bias + 4 * CLUSTER_WARPS / 2 * 64;
  const int resident = std::min(s.slice_blocks, column_tiles == 1 ? FORWARD_RESIDENT<1> : FORWARD_RESIDENT<2>);
  const int block_bytes = 3 * s.warps * LEFT_BYTES;
  // Weights for registers pass through shared memory at the start.
  s.bytes = std::max(s.left + (s.slice_blocks - resident) * block_bytes, resident * block_bytes);
  return s;
}

struct BackwardShape {
  int cluster;
  int tiles;
  int most;           // tiles of a block, at the most
  int warp_tiles;     // tiles of grad_h that a warp multiplies for, at the most
  int warps;          // that multiply
  int operand_bytes;  // gate gradients of the block's units; there are two, at AFTER_BARRIERS
  int gate_stride;
  int sums;  // offset of the sums that blocks send, fragments [block][tile of this block][column tile]; two of them
  int sums_bytes;  // of one
  int left;        // offset of the left operands not in registers, [block after the resident][tile][warp]
  int bytes;       // of shared memory; 0: there is no such shape
};

inline BackwardShape backward_shape(int H, Precision precision, int cluster, int column_tiles) {
  BackwardShape s{};
  s.cluster = cluster;
  s.tiles = ceil_div(H, TILE);
  s.gate_stride = gate_stride(H);
  s.most = ceil_div(s.tiles, cluster);
  s.warp_tiles = ceil_div(s.tiles, CLUSTER_WARPS);
  if (s.tiles < cluster || s.most * column_tiles * 64 > CLUSTER_THREADS || s.warp_tiles > BACKWARD_TILES) return s;
  s.warps = ceil_div(s.tiles, s.warp_tiles);
  const int blocks = 3 * s.most * blocks_per_tile(precision);
  s.operand_bytes = blocks * column_tiles * BLOCK_BYTES;
  s.sums = AFTER_BARRIERS + 2 * s.operand_bytes;
  s.sums_bytes = cluster * s.most * column_tiles * FRAGMENT_BYTES;
  s.left = s.sums + 2 * s.sums_bytes;
  const int resident = std::min(blocks, column_tiles == 1 ? BACKWARD_RESIDENT<1> : BACKWARD_RESIDENT<2>);
  const int block_bytes = s.warp_tiles * s.warps * LEFT_BYTES;
  s.bytes = std::max(s.left + (blocks - resident) * block_bytes, resident * block_bytes);
  return s;
}

}  // namespace cuda
}  // namespace fastgru
