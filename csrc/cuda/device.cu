// Queries the CUDA runtime, the driver and the attributes of this library's code.
#include <cuda_runtime.h>

#include "device.h"

namespace fastgru {
namespace cuda {
namespace {

// Never launched. CUDA reports the architecture of a kernel's code, and all kernels are compiled for the same ones.
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
  // Clears the error, which the next caller of CUDA would otherwise get.
  cudaGetLastError();
  *error = cudaGetErrorString(status);
  return 0;
}

}  // namespace cuda
}  // namespace fastgru
