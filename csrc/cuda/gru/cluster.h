// Runs the recurrence of one GRU layer in clusters of thread blocks, each of which holds one copy of W_hh. types.h has
// the structs. No torch and no CUDA header here.
#pragma once

#include "types.h"

namespace fastgru {
namespace cuda {

// Both enqueue one launch on `stream`, neither allocate nor wait, and may be captured in a CUDA graph. They return
// null, or the reason why nothing was enqueued, a string that is never freed.
const char* gru_cluster_forward(const GruForwardLoop& loop, CUstream_st* stream);
const char* gru_cluster_backward(const GruBackwardLoop& loop, CUstream_st* stream);

// Null when a layer of this size runs on `device` forwards and backwards, else the reason. Sizes and limits are
// checked, nothing is launched.
const char* gru_cluster_why_not(int H, int B, Precision precision, int device);

}  // namespace cuda
}  // namespace fastgru
