// Launches the backward recurrence in clusters.
#include "cluster.h"
#include "cluster_backward.cuh"
#include "cluster_launch.cuh"

namespace fastgru {
namespace cuda {
namespace {

template <Precision P, int COLUMN_TILES>
__global__ void __launch_bounds__(CLUSTER_THREADS, 1)
    gru_cluster_backward_kernel(const __grid_constant__ GruBackwardLoop loop,
                                const __grid_constant__ BackwardShape shape) {
  // Earlier architectures have no clusters.
#if __CUDA_ARCH__ >= 900
  gru_cluster_backward_block<P, COLUMN_TILES>(loop, shape);
#endif
}

template <Precision P>
const void* kernel_for(int column_tiles) {
  return column_tiles == 1 ? reinterpret_cast<const void*>(gru_cluster_backward_kernel<P, 1>)
                           : reinterpret_cast<const void*>(gru_cluster_backward_kernel<P, 2>);
}

const void* kernel_of(Precision precision, int column_tiles) {
  return precision == Precision::bf16  ? kernel_for<Precision::bf16>(column_tiles)
         : precision == Precision::f16 ? kernel_for<Precision::f16>(column_tiles)
                                       : kernel_for<Precision::tf32>(column_tiles);
}

}  // namespace

const char* gru_cluster_backward(const GruBackwardLoop& loop, CUstream_st* stream) {
  return launch_clusters(backward_shape, kernel_of, loop, stream);
}

const char* gru_cluster_backward_why_not(int H, int B, Precision precision) {
  ClusterPlan<BackwardShape> plan;
  return plan_clusters(backward_shape, kernel_of, H, B, 1, precision, &plan);
}

}  // namespace cuda
}  // namespace fastgru
