// Computes what surrounds the recurrence of a GRU layer, apart from matrix products, for all tokens at once: the states
// before each token, and the gates again from finished products. No torch header here. The functions enqueue on
// `stream`, neither allocate nor wait, and return CUDA's error message, or null.
#pragma once

#include <cstdint>

#include "types.h"

namespace fastgru {
namespace cuda {

// Copies n integers from the host to the device as arguments of launches: no wait for a copy engine, and a captured
// CUDA graph holds the values.
const char* upload(const int32_t* host, int32_t* device, int n, CUstream_st* stream);

struct GruTokens {
  int T, B, H, D, N;     // as in types.h
  const int32_t* table;  // as in types.h
};

// previous [N, D, H]: the state before each token, which is the output [N, D, H] of the step before, or hx [D, B, H] of
// the first step. Elements have `bytes` bytes.
const char* gru_previous_states(const GruTokens& tokens, int bytes, const void* output, const void* hx, void* previous,
                                CUstream_st* stream);

// gates [D, N, 4, gate_stride(H)] as the recurrence saves them, from i = x W_ih^T and g = h W_hh^T, both [N, D, 3H]
// without bias, where h is the state before each token. b_ih, b_hh: [D, 3H], or both null.
const char* gru_gates(const GruTokens& tokens, Precision precision, const void* i, const void* g, const void* b_ih,
                      const void* b_hh, void* gates, CUstream_st* stream);

}  // namespace cuda
}  // namespace fastgru
