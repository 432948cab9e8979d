// The torch-free interface of the GRU on the CPU: plain structs.
//
// Equations (torch.nn.GRU; the reset gate acts after the recurrent product):
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)       z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   q = W_hn h + b_hn        n = tanh(W_in x + b_in + r * q)        h' = n + z * (h - n)
// Backward, with dh = dL/dh' and carried from the step after:
//   da_n = dh (1 - z) (1 - n^2)      da_z = dh (h - n) z (1 - z)      da_q = da_n r      da_r = da_n q r (1 - r)
//   dL/dh = dh z + [da_r da_z da_q] W_hh          dL/dx = [da_r da_z da_n] W_ih
//   dW_ih = [da_r da_z da_n]^T x     dW_hh = [da_r da_z da_q]^T h     db likewise, with x and h replaced by ones
//
// Letters: T steps, B rows of the batch, N tokens (T * B, or the sum of batch_sizes), I inputs, H hidden units,
// D directions, W lanes of a vector of the compute type. Compute type: double for f64, otherwise float.
#pragma once

#include <cstdint>

namespace fastgru {

// Hidden units of a saved row are padded to this many, a multiple of every W, unless they are few.
constexpr int64_t kSavedAlign = 16, kFewUnits = 8;
constexpr int64_t saved_units(int64_t H) {
  return H <= kFewUnits ? H : (H + kSavedAlign - 1) / kSavedAlign * kSavedAlign;
}

struct GruWeights {
  const void* w_ih;  // [3H, I] gates r, z, n; contiguous, storage type
  const void* w_hh;  // [3H, H]
  const void* b_ih;  // [3H] or null
  const void* b_hh;  // [3H] or null
};

struct GruShape {
  int64_t T, B, I, H, N;
  int D;                       // 1, or 2 (the second direction runs from the last step to the first)
  const int64_t* batch_sizes;  // [T] non-increasing rows per step, or null when every step has B rows
  const void* x;               // token (t, b) at x + t * x_stride_t + b * x_stride_b, I contiguous elements
  int64_t x_stride_t;          // in elements; packed input: not used, token n at x + n * x_stride_b
  int64_t x_stride_b;
  const void* h0;  // [D, B, H] contiguous
  GruWeights w[2];
};

struct GruForward {
  GruShape s;
  void* y;      // [N, D * H] out
  void* h_n;    // [D, B, H] out
  void* gates;  // [D, N, 4 * saved_units(H)] out, or null: see saved_gate() and few_units.inl.h, storage type
};

struct GruBackward {
  GruShape s;
  const void* dy;        // [N, D * H] contiguous, or null (zero)
  const void* dh_n;      // [D, B, H] contiguous, or null (zero)
  const void* y;         // [N, D * H] as the forward pass wrote it
  const void* gates;     // as the forward pass wrote it, or null: computed again
  void* dx;              // [N, I] out, or null (not wanted)
  void* dh0;             // [D, B, H] out
  void* dw_ih;           // [D, 3H, I] out, or null: no weight gradient is wanted
  void* dw_hh;           // [D, 3H, H] out, or null with dw_ih
  void* db_ih;           // [D, 3H] out, or null with dw_ih
  void* db_hh;           // [D, 3H] out, or null with dw_ih
  int64_t chunk_tokens;  // tokens whose gate gradients are held at once; 0: as many as stay near
};

}  // namespace fastgru
