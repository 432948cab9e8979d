// Describes one GRU layer to the CUDA kernels: the structs of the forward and the backward recurrence. No torch and no
// CUDA header here.
//
// kernels/gru/cell.py has the equations. The layouts are those of the Triton kernels there, so that both share the
// input projection before the recurrence and the products after it. All arrays are contiguous, on the current device.
#pragma once

#include <cstdint>

#include "cuda/precision.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace fastgru {
namespace cuda {

struct GruForwardLoop {
  Precision precision;
  int T;  // steps
  int B;  // batch
  int H;  // hidden units
  int D;  // directions, 1 or 2; the second runs backwards
  int N;  // tokens: the active rows of all steps, step by step; T * B, less when the input is packed

  const void* i;         // [N, D, 3H] x W_ih^T without bias; r, z, n one after the other
  const void* w_hh;      // [D, 3H, H]
  const void* b_ih;      // [D, 3H], or null
  const void* b_hh;      // [D, 3H], null when b_ih is
  const void* hx;        // [D, B, H]
  const int32_t* table;  // packed input: [T + 1 + B] the first token of the steps 0..T, then the number of steps of
                         // each row, which never grows; null: step t begins at token t * B

  void* output;  // [N, D, H]
  void* h_n;     // [D, B, H] the last state of each row
  void* gates;   // [D, N, 4, gate_stride(H)] r, z, n, q, padding included; null: not wanted
};

struct GruBackwardLoop {
  Precision precision;
  int T, B, H, D, N;  // as above

  const void* grad_output;  // [N, D, H], or null for zeros
  const void* grad_h_n;     // [D, B, H], or null for zeros
  const void* w_hh;         // [D, 3H, H]
  const void* previous;     // [N, D, H] the state before each token: output of the step before, or hx
  const void* gates;        // [D, N, 4, gate_stride(H)] as forward saved them
  const int32_t* table;     // as above

  void* grad_gates;  // [N, 4 * D * H] first d_r, d_z, d_n of each direction, then d_q of each direction
  void* grad_hx;     // [D, B, H]
};

// Columns that one gate takes in `gates`; fastgru.backends.reference.gate_stride.
constexpr int gate_stride(int hidden) { return (hidden + 15) / 16 * 16; }

}  // namespace cuda
}  // namespace fastgru
