// Queries the CUDA versions of the build and of the driver, and which code of this library a device runs. No torch
// header here.
#pragma once

namespace fastgru {
namespace cuda {

// CUDA's numbers of versions: 13000 for 13.0. The driver's is the newest CUDA it supports; 0 without a driver.
int runtime_version();
int driver_version();

// The architecture (90 for sm_90) of the code in this library that `device` runs, compiled ahead of time or from PTX by
// the driver. On failure returns 0 and sets *error to CUDA's message.
int code_architecture(int device, const char** error);

}  // namespace cuda
}  // namespace fastgru
