// Chooses the size of the clusters for a layer, and launches a cluster kernel. Host code.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cluster_shape.h"

namespace fastgru {
namespace cuda {

// Null when gru_cluster_backward runs a layer of this size on the current device, else the reason.
const char* gru_cluster_backward_why_not(int H, int B, Precision precision);

template <typename Shape>
struct ClusterPlan {
  const void* kernel = nullptr;
  Shape shape;
  int blocks = 0;  // of one direction
};

// CUDA's message for a failure. Clears the error, which the next caller of CUDA would otherwise get.
inline const char* cuda_failure(cudaError_t status) {
  cudaGetLastError();
  return cudaGetErrorString(status);
}

inline cudaLaunchConfig_t cluster_config(int cluster, int blocks, int directions, int bytes,
                                         cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = cluster;
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, directions);
  config.blockDim = dim3(CLUSTER_THREADS);
  config.dynamicSmemBytes = bytes;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

// The number of clusters of this shape that the current device runs at once; 0 and *error set when CUDA refuses.
// Cached, because the query takes long; the first one for a shape also sets the kernel's attributes.
inline int active_clusters(const void* kernel, int cluster, int bytes, const char** error) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, std::pair<int, const char*>> known;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return *error = cuda_failure(status), 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace({kernel, device, cluster, bytes}, 0, nullptr);
  auto& [clusters, why] = found->second;
  if (is_new) {
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kernel);
    // Below 9.0 the kernels are compiled with an empty body.
    if (status == cudaSuccess && (attributes.ptxVersion < 90 || attributes.binaryVersion < 90)) {
      why = "the code of this build that the GPU runs is for compute capability below 9.0, which has no clusters";
    } else {
      if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      // The most that any shape takes, because the attribute is the kernel's, not the launch's.
      int most = 0;
      if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      cudaLaunchAttribute attribute;
      const cudaLaunchConfig_t config = cluster_config(cluster, cluster, 1, bytes, &attribute);
      if (status == cudaSuccess && bytes <= most) status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
      if (status != cudaSuccess) clusters = 0, why = cuda_failure(status);
    }
  }
  *error = why;
  return clusters;
}

// Returns null and fills `plan`, or returns the reason why there is none.
//
// The plan with the fewest rounds of clusters wins. Among equals 8 columns come before 16, because a step waits for the
// exchange, and large clusters before small ones, whose weights overflow into shared memory. Not yet measured.
template <typename Shape>
const char* plan_clusters(Shape (*shape_of)(int, Precision, int, int), const void* (*kernel_of)(Precision, int), int H,
                          int B, int D, Precision precision, ClusterPlan<Shape>* plan) {
  const char* why = "the hidden size does not suit clusters: W_hh has to fit on the chips of 4 to 16 multiprocessors";
  int fewest = 0;
  for (const int column_tiles : {1, 2})
    for (const int cluster : {16, 8, 4}) {
      const Shape shape = shape_of(H, precision, cluster, column_tiles);
      if (shape.bytes == 0 || shape.bytes > SHARED_BYTES) continue;
      const void* kernel = kernel_of(precision, column_tiles);
      const char* error = nullptr;
      const int active = active_clusters(kernel, cluster, shape.bytes, &error);
      if (active == 0) {
        why = error != nullptr ? error : "the GPU, or the part of it that is ours, has no room for a cluster";
        continue;
      }
      const int clusters = ceil_div(B, COLUMNS * column_tiles), rounds = ceil_div(clusters * D, active);
      if (plan->kernel == nullptr || rounds < fewest) {
        fewest = rounds;
        *plan = {kernel, shape, clusters * cluster};
      }
    }
  return plan->kernel != nullptr ? nullptr : why;
}

template <typename Loop, typename Shape>
const char* launch_clusters(Shape (*shape_of)(int, Precision, int, int), const void* (*kernel_of)(Precision, int),
                            const Loop& loop, CUstream_st* stream) {
  if (loop.B == 0) return nullptr;
  ClusterPlan<Shape> plan;
  const char* why = plan_clusters(shape_of, kernel_of, loop.H, loop.B, loop.D, loop.precision, &plan);
  if (why != nullptr) return why;
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = cluster_config(plan.shape.cluster, plan.blocks, loop.D, plan.shape.bytes, &attribute);
  config.stream = stream;
  void* arguments[] = {const_cast<Loop*>(&loop), &plan.shape};
  const cudaError_t status = cudaLaunchKernelExC(&config, plan.kernel, arguments);
  return status == cudaSuccess ? nullptr : cuda_failure(status);
}

}  // namespace cuda
}  // namespace fastgru
