#include <cuda_runtime.h>

#include "device.h"

namespace fastgru {
namespace cuda {
namespace {

// Stands for every kernel of this library: all are compiled for the same architectures.
__global__ void probe() {}

}  // namespace

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int code_architecture(int device, const char** error) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  cudaFuncAttributes attributes{};
  if (status == cudaSuccess) {
    status = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(before);
  }
  if (status == cudaSuccess) return attributes.binaryVersion;
  // An error that is left behind would be reported by whoever calls CUDA next.
  cudaGetLastError();
  *error = cudaGetErrorString(status);
  return 0;
}

}  // namespace cuda
}  // namespace fastgru
