// Launches the kernels of tokens.cuh, and copies small tables to the device as arguments of a kernel.
#include <cuda_runtime.h>

#include "tokens.cuh"

namespace fastgru {
namespace cuda {
namespace {

// As many words as fit in the arguments of a launch on every GPU and driver: 4 KiB in all.
struct Words {
  static constexpr int COUNT = 992;
  int32_t value[COUNT];
};

__global__ void store_words(const Words words, int32_t* target, int n) {
  for (int i = int(threadIdx.x); i < n; i += TOKEN_THREADS) target[i] = words.value[i];
}

template <typename Word>
__global__ void gru_previous_states_kernel(const GruTokens s, int words, const Word* output, const Word* hx,
                                           Word* previous) {
  gru_previous_states_block(s, words, output, hx, previous);
}

template <Precision P>
__global__ void gru_gates_kernel(const GruTokens s, const typename Numbers<P>::Stored* i,
                                 const typename Numbers<P>::Stored* g, const typename Numbers<P>::Stored* b_ih,
                                 const typename Numbers<P>::Stored* b_hh, typename Numbers<P>::Stored* gates) {
  gru_gates_block<P>(s, i, g, b_ih, b_hh, gates);
}

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Word>
void launch_previous(const GruTokens& s, int64_t row_bytes, const void* output, const void* hx, void* previous,
                     cudaStream_t stream) {
  const dim3 grid(unsigned(s.T) * unsigned((s.B + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK), unsigned(s.D));
  gru_previous_states_kernel<<<grid, TOKEN_THREADS, 0, stream>>>(
      s, int(row_bytes / int64_t(sizeof(Word))), static_cast<const Word*>(output), static_cast<const Word*>(hx),
      static_cast<Word*>(previous));
}

template <Precision P>
void launch_gates(const GruTokens& s, const void* i, const void* g, const void* b_ih, const void* b_hh, void* gates,
                  cudaStream_t stream) {
  using Stored = typename Numbers<P>::Stored;
  gru_gates_kernel<P><<<dim3(unsigned(s.N), unsigned(s.D)), TOKEN_THREADS, 0, stream>>>(
      s, static_cast<const Stored*>(i), static_cast<const Stored*>(g), static_cast<const Stored*>(b_ih),
      static_cast<const Stored*>(b_hh), static_cast<Stored*>(gates));
}

}  // namespace

const char* upload(const int32_t* host, int32_t* device, int n, CUstream_st* stream) {
  Words words;
  for (int at = 0; at < n; at += Words::COUNT) {
    const int count = std::min(n - at, Words::COUNT);
    std::copy(host + at, host + at + count, words.value);
    store_words<<<1, TOKEN_THREADS, 0, stream>>>(words, device + at, count);
  }
  return status();
}

const char* gru_previous_states(const GruTokens& s, int bytes, const void* output, const void* hx, void* previous,
                                CUstream_st* stream) {
  const int64_t row_bytes = int64_t(s.H) * bytes;
  if (row_bytes % 16 == 0)
    launch_previous<SixteenBytes>(s, row_bytes, output, hx, previous, stream);
  else if (row_bytes % 4 == 0)
    launch_previous<uint32_t>(s, row_bytes, output, hx, previous, stream);
  else
    launch_previous<uint16_t>(s, row_bytes, output, hx, previous, stream);
  return status();
}

const char* gru_gates(const GruTokens& s, Precision precision, const void* i, const void* g, const void* b_ih,
                      const void* b_hh, void* gates, CUstream_st* stream) {
  if (precision == Precision::bf16)
    launch_gates<Precision::bf16>(s, i, g, b_ih, b_hh, gates, stream);
  else if (precision == Precision::f16)
    launch_gates<Precision::f16>(s, i, g, b_ih, b_hh, gates, stream);
  else
    launch_gates<Precision::tf32>(s, i, g, b_ih, b_hh, gates, stream);
  return status();
}

}  // namespace cuda
}  // namespace fastgru
