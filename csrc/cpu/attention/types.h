// Arguments of the CPU kernels of attention, as plain pointers, sizes and strides: no torch header is needed.
//
// Equations, for query i of a head and key j of the key head that it shares with its group:
//   x = scale * q_i . k_j         c = softcap * tanh(x / softcap), or x        s = c - slope |i + offset - j| + bias
//   p = exp(s - m_i) / l_i        l_i = sum_j exp(s - m_i)                     o_i = sum_j drop(p) v_j
// with m_i, a lazily updated maximum, near the largest s of the row, and lse_i = m_i + log l_i where it is asked for.
// Backward, with delta_i = do_i . o_i - dlse_i, or sum_j p dp - dlse_i, which is the same:
//   dp = drop(do_i . v_j)         ds = p (dp - delta_i)                        dx = ds (1 - (c / softcap)^2)
//   dq_i = scale sum_j dx k_j     dk_j = scale sum_i dx q_i    dv_j = sum_i drop(p) do_i    dbias = ds
// s is -inf where i may not see j, and where bias is -inf; what such a position holds, NaN included, reaches nothing. A
// row that sees nothing has o = 0, l = 0 and lse = -inf. Saved for the backward pass: o, m and l. (lse alone would not
// do: it is rounded as the score is, by 32 at a score of 1e9.)
//
// Letters: B sequences, Hq and Hk heads of queries and keys, Lq and Lk their lengths, D and Dv columns of keys and
// values. Compute type: double for f64, otherwise float.
#pragma once

#include <cstdint>

namespace fastgru {

// Element (b, h, l, d) of a tensor of 4 dimensions is data[b * stride_b + h * stride_h + l * stride_l + d].
struct Heads {
  void* data;
  int64_t stride_b, stride_h, stride_l;

  template <class T>
  T* row(int64_t b, int64_t h, int64_t l) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h + l * stride_l;
  }
};

// A bias or mask of the scores [B, Hq, Lq, Lk]; strides are 0 where it is broadcast, that of keys is 0 or 1.
struct PerScore {
  const void* data;  // or null
  int64_t stride_b, stride_h, stride_l, stride_k;
};

struct AttentionShape {
  int64_t B, Hq, Hk, Lq, Lk, D, Dv;
  Heads q;                   // [B, Hq, Lq, D]
  Heads k;                   // [B, Hk, Lk, D]
  Heads v;                   // [B, Hk, Lk, Dv]
  PerScore bias;             // storage type
  PerScore mask;             // bytes; 0: hidden
  const int64_t* q_lengths;  // [B], within [0, Lq], or null
  const int64_t* k_lengths;  // [B], within [0, Lk], or null
  const void* slopes;        // ALiBi: compute type, slope of head h at b * slope_stride + h; or null
  int64_t slope_stride;
  const int64_t* seed;  // of dropout; null: no dropout
  uint32_t drop_below;  // a position is dropped when its hashed bits are below this
  double dropout_p, scale, softcap;
  int64_t window_left, window_right;  // negative: no bound
  bool bottom_right;                  // the diagonal ends at the last query and key; else it starts at the first
};

struct AttentionForward {
  AttentionShape s;
  Heads out;         // [B, Hq, Lq, Dv] out
  void* lse;         // [B, Hq, Lq] out, contiguous, compute type; null: not wanted
  void* statistics;  // [2, B, Hq, Lq] out, likewise: m, which is in q . k where nothing but hiding is done to the
                     // scores and the scale is positive, else in s; and l
};

struct AttentionBackward {
  AttentionShape s;
  Heads d_out;        // [B, Hq, Lq, Dv]; no data: zero
  const void* d_lse;  // [B, Hq, Lq] contiguous, compute type; null: zero
  Heads out;          // as the forward pass wrote it
  const void* statistics;
  Heads dq, dk, dv;         // out, shapes of q, k, v
  void* d_bias;             // contiguous, out; null: not wanted
  int64_t d_bias_shape[4];  // sizes: those of the scores, or 1
};

}  // namespace fastgru
