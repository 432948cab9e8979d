// Computes the indices of a thread of a cluster kernel: its block, its warp, and the pair of hidden units that it owns.
#pragma once

#include "pair.cuh"

namespace fastgru {
namespace cuda {

template <Precision P, int COLUMN_TILES>
struct ClusterThread {
  int thread, warp, lane;
  int rank, direction;  // of the block
  int tiles;            // that the block owns: rank, rank + cluster, ...
  int b0, steps;        // of the cluster: its first row, which is the longest, as rows are sorted by length
  // The pair: index of its tile in the block, its column and place there, its batch row, that row's steps, its units.
  int index, column_tile, column, place, pair, b, length, tile, unit[2];
  bool has_pair;

  template <typename Loop, typename Shape>
  FASTGRU_DEVICE ClusterThread(const Loop& loop, const Shape& shape) {
    thread = thread_index(), warp = thread / 32, lane = thread % 32;
    rank = cluster_rank(), direction = block_index_y();
    tiles = (shape.tiles - rank + shape.cluster - 1) / shape.cluster;
    b0 = block_index_x() / shape.cluster * (COLUMNS * COLUMN_TILES), steps = row_steps(loop.table, loop.T, b0);
    index = thread / 64 / COLUMN_TILES, column_tile = thread / 64 % COLUMN_TILES;
    column = thread % 64 / 8, place = thread % 8, pair = Numbers<P>::pair_of(place);
    has_pair = index < tiles;
    b = b0 + column_tile * COLUMNS + column;
    length = has_pair && b < loop.B ? row_steps(loop.table, loop.T, b) : 0;
    tile = rank + index * shape.cluster;
    unit[0] = tile * TILE + pair, unit[1] = unit[0] + 8;
  }
};

}  // namespace cuda
}  // namespace fastgru
