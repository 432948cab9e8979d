// The fast path's functions in the library of the operators, called by the Python module of csrc/python: the engine on
// plain memory. No torch header is needed to include this.
#pragma once

#include "attention/types.h"
#include "gru/types.h"
#include "kernel_table.h"

namespace fastgru {

// False: an exception ended the call, and nothing of what it wrote counts.
struct DirectCalls {
  // A null h0 stands for zeros; where h_n is null it is not wanted.
  bool (*gru_forward)(const GruForward&, DType);
  bool (*gru_backward)(const GruBackward&, DType);
  bool (*attention_forward)(const AttentionForward&, DType);
  bool (*attention_backward)(const AttentionBackward&, DType);
  // Prepares memory from torch that nothing has been written to yet.
  void (*fresh)(void* memory, size_t bytes);
};

}  // namespace fastgru

// The one symbol that the library exports besides what torch registers.
extern "C" __attribute__((visibility("default"))) const fastgru::DirectCalls* fastgru_direct_calls();
