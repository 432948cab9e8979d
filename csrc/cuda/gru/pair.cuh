// Computes one step for a pair, two hidden units of one row of the batch: loads the step's values, computes the gates
// or their gradients, and stores them. `unit` are the two units; those beyond H are neither loaded nor stored.
#pragma once

#include "operands.cuh"

namespace fastgru {
namespace cuda {

template <Precision P>
FASTGRU_DEVICE void store_pair(const int (&unit)[2], typename Numbers<P>::Stored* to, int end, float low, float high) {
  typename Numbers<P>::Stored values[2];
  Numbers<P>::to_stored(low, high, values);
  if (unit[0] < end) store_global(to + unit[0], values[0]);
  if (unit[1] < end) store_global(to + unit[1], values[1]);
}

// --- Forwards

// The bias of r, z, n or q, by `kind`; b_ih and b_hh of r and z are summed. Biases stay in shared memory: registers
// hold weights.
template <Precision P>
FASTGRU_DEVICE void load_bias(const GruForwardLoop& loop, int direction, const int (&unit)[2], int kind,
                              uint32_t (&words)[2]) {
  using Stored = typename Numbers<P>::Stored;
  const auto bias_of = [&](const void* biases, int gate, int unit) {
    const auto from = static_cast<const Stored*>(biases) + (direction * 3 + gate) * loop.H + unit;
    return biases != nullptr && unit < loop.H ? Numbers<P>::widen(load_constant(from)) : 0.0f;
  };
  for (int i = 0; i < 2; ++i) {
    const float of_i = kind < 3 ? bias_of(loop.b_ih, kind, unit[i]) : 0.0f;
    const float of_g = kind != 2 ? bias_of(loop.b_hh, kind < 3 ? kind : 2, unit[i]) : 0.0f;
    words[i] = bits_of(of_i + of_g);
  }
}

template <Precision P>
FASTGRU_DEVICE void load_projection(const GruForwardLoop& loop, int direction, const int (&unit)[2], int64_t token,
                                    bool active, typename Numbers<P>::Stored (&i_gates)[3][2]) {
  using Stored = typename Numbers<P>::Stored;
  const auto from = static_cast<const Stored*>(loop.i) + (token * loop.D + direction) * 3 * loop.H;
#pragma unroll
  for (int gate = 0; gate < 3; ++gate)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      i_gates[gate][i] = active && unit[i] < loop.H ? load_constant(from + gate * loop.H + unit[i]) : Stored(0);
}

struct Gates {
  float r[2], z[2], n[2], q[2];
};

// Computes the gates of a step and, where the row is active, its new state. `bias_offset(kind)` is the offset of a
// bias.
template <Precision P, typename Offset>
FASTGRU_DEVICE Gates compute_gates(const typename Numbers<P>::Stored (&i_gates)[3][2], const float (&g)[3][2],
                                   Offset bias_offset, bool active, float (&h)[2]) {
  using Num = Numbers<P>;
  float bias[4][2];
#pragma unroll
  for (int kind = 0; kind < 4; ++kind) {
    uint32_t words[2];
    load_shared(bias_offset(kind), words);
    bias[kind][0] = float_of(words[0]), bias[kind][1] = float_of(words[1]);
  }
  Gates a;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a.q[i] = g[2][i] + bias[3][i];
    a.r[i] = sigmoid(Num::widen(i_gates[0][i]) + bias[0][i] + g[0][i]);
    a.z[i] = sigmoid(Num::widen(i_gates[1][i]) + bias[1][i] + g[1][i]);
    a.n[i] = tanh(Num::widen(i_gates[2][i]) + bias[2][i] + a.r[i] * a.q[i]);
    // A row that has not begun or has ended keeps its state.
    if (active) h[i] = a.n[i] + a.z[i] * (h[i] - a.n[i]);
  }
  return a;
}

// Stores the state of an active row, and the gates if wanted.
template <Precision P>
FASTGRU_DEVICE void store_state(const GruForwardLoop& loop, int direction, const int (&unit)[2], int token, int stride,
                                const float (&h)[2], const Gates& a) {
  using Stored = typename Numbers<P>::Stored;
  store_pair<P>(unit, static_cast<Stored*>(loop.output) + (int64_t(token) * loop.D + direction) * loop.H, loop.H, h[0],
                h[1]);
  if (loop.gates == nullptr) return;
  const auto gates = static_cast<Stored*>(loop.gates) + (int64_t(direction) * loop.N + token) * 4 * stride;
  store_pair<P>(unit, gates, stride, a.r[0], a.r[1]);
  store_pair<P>(unit, gates + stride, stride, a.z[0], a.z[1]);
  store_pair<P>(unit, gates + 2 * stride, stride, a.n[0], a.n[1]);
  store_pair<P>(unit, gates + 3 * stride, stride, a.q[0], a.q[1]);
}

// --- Backwards

// The values of a step that the forward pass saved, and grad_output.
template <Precision P>
struct Saved {
  typename Numbers<P>::Stored grad_output[2], previous[2], gates[4][2];  // r, z, n, q
};

template <Precision P>
FASTGRU_DEVICE void load_saved(const GruBackwardLoop& loop, int direction, const int (&unit)[2], int64_t token,
                               bool active, int stride, Saved<P>& saved) {
  using Stored = typename Numbers<P>::Stored;
  const int64_t at = (token * loop.D + direction) * loop.H;
  const auto grad = static_cast<const Stored*>(loop.grad_output) + at;
  const auto previous = static_cast<const Stored*>(loop.previous) + at;
  const auto gates = static_cast<const Stored*>(loop.gates) + (int64_t(direction) * loop.N + token) * 4 * stride;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool there = active && unit[i] < loop.H;
    saved.grad_output[i] = there && loop.grad_output != nullptr ? load_constant(grad + unit[i]) : Stored(0);
    saved.previous[i] = there ? load_constant(previous + unit[i]) : Stored(0);
#pragma unroll
    for (int kind = 0; kind < 4; ++kind)
      saved.gates[kind][i] = there ? load_constant(gates + kind * stride + unit[i]) : Stored(0);
  }
}

// Computes d_r, d_z, d_n, d_q of a step, and replaces `carry` by d_h * z, the gradient that bypasses the product. A row
// that is not active keeps its carry, and its d are meaningless.
template <Precision P>
FASTGRU_DEVICE void compute_gradients(const Saved<P>& saved, bool active, float (&carry)[2], float (&d)[4][2]) {
  using Num = Numbers<P>;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float r = Num::widen(saved.gates[0][i]), z = Num::widen(saved.gates[1][i]);
    const float n = Num::widen(saved.gates[2][i]), q = Num::widen(saved.gates[3][i]);
    const float d_h = carry[i] + Num::widen(saved.grad_output[i]);
    d[2][i] = d_h * (1 - z) * (1 - n * n);
    d[1][i] = d_h * (Num::widen(saved.previous[i]) - n) * z * (1 - z);
    d[0][i] = d[2][i] * q * r * (1 - r);
    d[3][i] = d[2][i] * r;
    if (active) carry[i] = d_h * z;
  }
}

// Stores the gradients of the gates of an active row.
template <Precision P>
FASTGRU_DEVICE void store_gradients(const GruBackwardLoop& loop, int direction, const int (&unit)[2], int token,
                                    const float (&d)[4][2]) {
  using Stored = typename Numbers<P>::Stored;
  const auto to = static_cast<Stored*>(loop.grad_gates) + int64_t(token) * 4 * loop.D * loop.H;
#pragma unroll
  for (int kind = 0; kind < 4; ++kind)
    store_pair<P>(unit, to + (kind < 3 ? direction * 3 + kind : 3 * loop.D + direction) * loop.H, loop.H, d[kind][0],
                  d[kind][1]);
}

}  // namespace cuda
}  // namespace fastgru
