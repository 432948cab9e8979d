// Launches the forward recurrence in clusters, and says for which layers and devices clusters can run.
#include "cluster.h"
#include "cluster_forward.cuh"
#include "cluster_launch.cuh"

namespace fastgru {
namespace cuda {
namespace {

template <Precision P, int COLUMN_TILES>
__global__ void __launch_bounds__(CLUSTER_THREADS, 1)
    gru_cluster_forward_kernel(const __grid_constant__ GruForwardLoop loop,
                               const __grid_constant__ ForwardShape shape) {
  // Earlier architectures have no clusters.
#if __CUDA_ARCH__ >= 900
  gru_cluster_forward_block<P, COLUMN_TILES>(loop, shape);
#endif
}

template <Precision P>
const void* kernel_for(int column_tiles) {
  return column_tiles == 1 ? reinterpret_cast<const void*>(gru_cluster_forward_kernel<P, 1>)
                           : reinterpret_cast<const void*>(gru_cluster_forward_kernel<P, 2>);
}

const void* kernel_of(Precision precision, int column_tiles) {
  return precision == Precision::bf16  ? kernel_for<Precision::bf16>(column_tiles)
         : precision == Precision::f16 ? kernel_for<Precision::f16>(column_tiles)
                                       : kernel_for<Precision::tf32>(column_tiles);
}

}  // namespace

const char* gru_cluster_forward(const GruForwardLoop& loop, CUstream_st* stream) {
  return launch_clusters(forward_shape, kernel_of, loop, stream);
}

const char* gru_cluster_why_not(int H, int B, Precision precision, int device) {
  int before = 0, major = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return cuda_failure(status);
  if (major < 9) return "it has no clusters of thread blocks, which came with compute capability 9.0";
  status = cudaSetDevice(device);
  if (status != cudaSuccess) return cuda_failure(status);
  ClusterPlan<ForwardShape> plan;
  const char* why = plan_clusters(forward_shape, kernel_of, H, B, 1, precision, &plan);
  if (why == nullptr) why = gru_cluster_backward_why_not(H, B, precision);
  cudaSetDevice(before);
  return why;
}

}  // namespace cuda
}  // namespace fastgru
