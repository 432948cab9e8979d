// torch's current CUDA stream. No torch and no CUDA header here.
#pragma once

struct CUstream_st;  // a cudaStream_t and a CUstream point to one

namespace fastgru {
namespace cuda {

// The stream on which torch enqueues work of `device` in this thread. Raises with a CPU build of torch, which has none:
// this library loads with every build.
CUstream_st* current_stream(int device);

}  // namespace cuda
}  // namespace fastgru
