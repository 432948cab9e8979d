// Chooses the layout of the grid for a layer, and launches the kernels of grid.cuh cooperatively.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "grid.cuh"
#include "grid.h"

namespace fastgru {
namespace cuda {
namespace {

template <Precision P, int COLUMN_TILES>
__global__ void __launch_bounds__(GRID_THREADS, 1)
    gru_grid_forward_kernel(GruForwardLoop loop, GridShape shape, int first_direction, uint32_t* exchange) {
  gru_grid_forward_block<P, COLUMN_TILES>(loop, shape, first_direction, exchange);
}

template <Precision P, int COLUMN_TILES>
__global__ void __launch_bounds__(GRID_THREADS, 1)
    gru_grid_backward_kernel(GruBackwardLoop loop, GridShape shape, int first_direction, uint32_t* exchange) {
  gru_grid_backward_block<P, COLUMN_TILES>(loop, shape, first_direction, exchange);
}

// The kernel for a precision and 8 or 16 columns; LEFTS = 3 is forwards, 1 backwards.
template <int LEFTS>
const void* kernel_of(Precision precision, int column_tiles) {
  const auto with = [&](auto p) {
    constexpr Precision P = decltype(p)::value;
    if constexpr (LEFTS == 3)
      return column_tiles == 1 ? reinterpret_cast<const void*>(gru_grid_forward_kernel<P, 1>)
                               : reinterpret_cast<const void*>(gru_grid_forward_kernel<P, 2>);
    else
      return column_tiles == 1 ? reinterpret_cast<const void*>(gru_grid_backward_kernel<P, 1>)
                               : reinterpret_cast<const void*>(gru_grid_backward_kernel<P, 2>);
  };
  if (precision == Precision::bf16) return with(std::integral_constant<Precision, Precision::bf16>());
  if (precision == Precision::f16) return with(std::integral_constant<Precision, Precision::f16>());
  return with(std::integral_constant<Precision, Precision::tf32>());
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// The number of blocks of a kernel that the GPU runs at once. Cached, because the query takes long.
int capacity_of(const void* kernel, int bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, fresh] = known.insert({{kernel, bytes, device}, 0});
  if (fresh) {
    int each = 0;
    // The most that any shape takes, because the attribute is the kernel's, not the launch's.
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == cudaSuccess &&
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, GRID_THREADS, bytes) == cudaSuccess)
      at->second = each * attribute(cudaDevAttrMultiProcessorCount, device);
    // Clears the error, which the next caller of CUDA would otherwise get.
    cudaGetLastError();
  }
  return at->second;
}

struct Plan {
  const char* refused;
  const void* kernel;
  GridShape shape;
  int column_tiles, directions;  // directions per launch
};

// The layout with the shortest step that fits on the GPU: few columns per block, all directions at once.
template <int LEFTS>
Plan plan(int H, int B, int D, Precision precision, int device) {
  Plan plan{};
  if (!attribute(cudaDevAttrCooperativeLaunch, device)) {
    plan.refused = "this GPU does not launch a kernel cooperatively";
    return plan;
  }
  plan.refused = "it has room for H up to 2048 in bfloat16 and float16, 1024 in TF32";
  for (const auto& [column_tiles, directions] : {std::pair(1, D), std::pair(2, D), std::pair(1, 1), std::pair(2, 1)}) {
    const GridShape shape =
        column_tiles == 1 ? grid_shape<LEFTS, 1>(H, B, precision) : grid_shape<LEFTS, 2>(H, B, precision);
    if (shape.bytes == 0) continue;
    plan.refused = "its part of W_hh does not fit in the shared memory of a multiprocessor of this GPU";
    if (shape.bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) continue;
    plan.refused = "it needs a multiprocessor for every 16 hidden units of every 16 batch rows, and this GPU has fewer";
    const void* kernel = kernel_of<LEFTS>(precision, column_tiles);
    if (int64_t(shape.groups) * shape.tiles * directions > capacity_of(kernel, shape.bytes, device)) continue;
    return {nullptr, kernel, shape, column_tiles, directions};
  }
  return plan;
}

template <int LEFTS, typename Loop>
const char* launch(Loop loop, void* workspace, cudaStream_t stream) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  const Plan how = plan<LEFTS>(loop.H, loop.B, loop.D, loop.precision, device);
  if (how.refused != nullptr) return how.refused;
  GridShape shape = how.shape;
  auto exchange = static_cast<uint32_t*>(workspace);
  const size_t words = size_t(loop.D) * shape.groups * BUFFERS * shape.operand_words;
  status = cudaMemsetAsync(exchange, 0xff, words * sizeof(uint32_t), stream);
  for (int first = 0; first < loop.D && status == cudaSuccess; first += how.directions) {
    void* arguments[] = {&loop, &shape, &first, &exchange};
    const dim3 grid(unsigned(shape.groups * shape.tiles), unsigned(how.directions));
    status = cudaLaunchCooperativeKernel(how.kernel, grid, dim3(GRID_THREADS), arguments, size_t(shape.bytes), stream);
  }
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace

const char* gru_grid_why_not(int H, int B, int D, Precision precision, int device) {
  const char* forward = plan<3>(H, B, D, precision, device).refused;
  return forward != nullptr ? forward : plan<1>(H, B, D, precision, device).refused;
}

size_t gru_grid_workspace(int H, int B, int D, Precision precision) {
  const size_t columns = size_t(B + 2 * COLUMNS - 1) / (2 * COLUMNS) * 2 * COLUMNS;
  const size_t tiles = size_t(H + TILE - 1) / TILE;
  return D * (columns / COLUMNS) * BUFFERS * 3 * tiles * blocks_per_tile(precision) * BLOCK_BYTES;
}

const char* gru_grid_forward(const GruForwardLoop& loop, void* workspace, CUstream_st* stream) {
  return launch<3>(loop, workspace, stream);
}

const char* gru_grid_backward(const GruBackwardLoop& loop, void* workspace, CUstream_st* stream) {
  return launch<1>(loop, workspace, stream);
}

}  // namespace cuda
}  // namespace fastgru
