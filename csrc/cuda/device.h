// What the CUDA part was built with, and what it can run on this machine. No torch header here.
#pragma once

namespace fastgru {
namespace cuda {

// Both as CUDA numbers its versions, 13000 for 13.0. The driver's is the newest CUDA it can run; 0 without a driver.
int runtime_version();
int driver_version();

// The architecture (90 for sm_90) of the code in this library that `device` runs, compiled ahead of time or from PTX by
// the driver. On failure returns 0 and sets *error to CUDA's own words.
int code_architecture(int device, const char** error);

}  // namespace cuda
}  // namespace fastgru
