// Runs the recurrence of one GRU layer with W_hh spread over the whole GPU, one tile of 16 hidden units per
// multiprocessor: for a large H and a small batch. types.h has the structs. No torch and no CUDA header here.
#pragma once

#include <cstddef>

#include "types.h"

namespace fastgru {
namespace cuda {

// Null when a layer of this size runs on `device` forwards and backwards, else the reason.
const char* gru_grid_why_not(int H, int B, int D, Precision precision, int device);

// Bytes of device memory that a call needs, at an address that is a multiple of 256. They are initialised on the stream
// before the launch, so that a replayed CUDA graph starts as the first run did.
size_t gru_grid_workspace(int H, int B, int D, Precision precision);

// As gru_cluster_forward and gru_cluster_backward.
const char* gru_grid_forward(const GruForwardLoop& loop, void* workspace, CUstream_st* stream);
const char* gru_grid_backward(const GruBackwardLoop& loop, void* workspace, CUstream_st* stream);

}  // namespace cuda
}  // namespace fastgru
