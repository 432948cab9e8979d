// See gru_rows.h. One thread per element, or per 16 bytes where that divides a row of H; memory is the limit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "gru_rows.h"

namespace fastgru {
namespace cuda {
namespace {

constexpr int kThreads = 256, kRowsPerBlock = 8;

// As many as the arguments of a launch have room for on every GPU and driver: 4 KiB in all.
struct Words {
  static constexpr int kCount = 992;
  int32_t value[kCount];
};

__global__ void store_words(const Words words, int32_t* target, int n) {
  for (int i = int(threadIdx.x); i < n; i += kThreads) target[i] = words.value[i];
}

struct Step {
  int row, size;
};

__device__ Step step_of(const GruRows& s, int t) {
  if (s.rows == nullptr) return {t * s.B, s.B};
  const int first = s.rows[t];
  return {first, s.rows[t + 1] - first};
}

// Grid: (T, ceil(B / kRowsPerBlock), D). `words`: Words per row of H.
template <class Word>
__global__ void previous_states(const GruRows s, int words, const Word* output, const Word* hx, Word* previous) {
  const int t = int(blockIdx.x), direction = int(blockIdx.z), before = direction == 0 ? t - 1 : t + 1;
  const Step now = step_of(s, t);
  const Step last = before >= 0 && before < s.T ? step_of(s, before) : Step{0, 0};
  const int b0 = int(blockIdx.y) * kRowsPerBlock, rows = min(kRowsPerBlock, now.size - b0);
  for (int i = int(threadIdx.x); i < rows * words; i += kThreads) {
    const int b = b0 + i / words, word = i % words;
    const Word* from = b < last.size ? output + (int64_t(last.row + b) * s.D + direction) * words
                                     : hx + (int64_t(direction) * s.B + b) * words;
    previous[(int64_t(now.row + b) * s.D + direction) * words + word] = from[word];
  }
}

__device__ float wide(float x) { return x; }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float wide(__half x) { return __half2float(x); }
__device__ void narrow(float x, float* to) { *to = x; }
__device__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Grid: (N, D). Padding holds what the equations give for zeros.
template <class T>
__global__ void gates_of_rows(int N, int H, const T* i, const T* g, const T* b_ih, const T* b_hh, T* gates) {
  const int row = int(blockIdx.x), direction = int(blockIdx.y), stride = gate_stride(H);
  const int64_t at = (int64_t(row) * int(gridDim.y) + direction) * 3 * H;
  T* to = gates + (int64_t(direction) * N + row) * 4 * stride;
  for (int unit = int(threadIdx.x); unit < stride; unit += kThreads) {
    float i_rzn[3] = {}, g_rzn[3] = {};
    if (unit < H)
      for (int gate = 0; gate < 3; ++gate) {
        const int column = gate * H + unit;
        i_rzn[gate] = wide(i[at + column]);
        g_rzn[gate] = wide(g[at + column]);
        if (b_ih != nullptr) {
          i_rzn[gate] += wide(b_ih[direction * 3 * H + column]);
          g_rzn[gate] += wide(b_hh[direction * 3 * H + column]);
        }
      }
    const float r = sigmoid(i_rzn[0] + g_rzn[0]), z = sigmoid(i_rzn[1] + g_rzn[1]);
    narrow(r, to + unit);
    narrow(z, to + stride + unit);
    narrow(tanhf(i_rzn[2] + r * g_rzn[2]), to + 2 * stride + unit);
    narrow(g_rzn[2], to + 3 * stride + unit);
  }
}

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Word>
void launch_previous(const GruRows& s, int64_t row_bytes, const void* output, const void* hx, void* previous,
                     cudaStream_t stream) {
  const dim3 grid(unsigned(s.T), unsigned((s.B + kRowsPerBlock - 1) / kRowsPerBlock), unsigned(s.D));
  previous_states<<<grid, kThreads, 0, stream>>>(s, int(row_bytes / int64_t(sizeof(Word))),
                                                 static_cast<const Word*>(output), static_cast<const Word*>(hx),
                                                 static_cast<Word*>(previous));
}

template <class T>
void launch_gates(const GruRows& s, const void* i, const void* g, const void* b_ih, const void* b_hh, void* gates,
                  cudaStream_t stream) {
  gates_of_rows<<<dim3(unsigned(s.N), unsigned(s.D)), kThreads, 0, stream>>>(
      s.N, s.H, static_cast<const T*>(i), static_cast<const T*>(g), static_cast<const T*>(b_ih),
      static_cast<const T*>(b_hh), static_cast<T*>(gates));
}

}  // namespace

const char* upload(const int32_t* host, int32_t* device, int n, CUstream_st* stream) {
  Words words;
  for (int at = 0; at < n; at += Words::kCount) {
    const int count = std::min(n - at, Words::kCount);
    std::copy(host + at, host + at + count, words.value);
    store_words<<<1, kThreads, 0, stream>>>(words, device + at, count);
  }
  return status();
}

const char* gru_previous_states(const GruRows& s, int bytes, const void* output, const void* hx, void* previous,
                                CUstream_st* stream) {
  const int64_t row_bytes = int64_t(s.H) * bytes;
  if (row_bytes % 16 == 0)
    launch_previous<uint4>(s, row_bytes, output, hx, previous, stream);
  else if (row_bytes % 4 == 0)
    launch_previous<uint32_t>(s, row_bytes, output, hx, previous, stream);
  else
    launch_previous<uint16_t>(s, row_bytes, output, hx, previous, stream);
  return status();
}

const char* gru_gates(const GruRows& s, Precision precision, const void* i, const void* g, const void* b_ih,
                      const void* b_hh, void* gates, CUstream_st* stream) {
  if (precision == Precision::bf16)
    launch_gates<__nv_bfloat16>(s, i, g, b_ih, b_hh, gates, stream);
  else if (precision == Precision::f16)
    launch_gates<__half>(s, i, g, b_ih, b_hh, gates, stream);
  else
    launch_gates<float>(s, i, g, b_ih, b_hh, gates, stream);
  return status();
}

}  // namespace cuda
}  // namespace fastgru
