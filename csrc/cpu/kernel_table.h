// The table of kernels that an engine fills, one engine per instruction set, and what a kernel gets besides its
// operands. No torch header is needed to include this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgru {

struct GruForward;
struct GruBackward;
struct AttentionForward;
struct AttentionBackward;

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kDTypes = 4;

// The body of a parallel region. It must not throw: the caller would wait for its worker for ever.
using RegionBody = void (*)(int worker, void* arg) noexcept;

// How a call gets its threads. `run(n, body, arg)` calls body(0, arg) ... body(n - 1, arg), each once, at the same time
// or one after the other: the engine relies on neither.
struct Parallel {
  int threads;
  void (*run)(int n, RegionBody body, void* arg);
  // Receives after a run for how much of it the caller waited for a core that something else had.
  void (*waited)(int64_t waited_ns, int64_t total_ns);
};

// Scratch memory, obtained by the caller once the engine has said how much it needs. Throws what the allocator throws.
struct Scratch {
  void* context;
  void* (*allocate)(void* context, size_t bytes);  // aligned to 64, lives until the call returns
};

// The kernels of one storage type.
struct Kernels {
  void (*gru_forward)(const GruForward&, const Parallel&, const Scratch&);
  void (*gru_backward)(const GruBackward&, const Parallel&, const Scratch&);
  void (*attention_forward)(const AttentionForward&, const Parallel&, const Scratch&);
  void (*attention_backward)(const AttentionBackward&, const Parallel&, const Scratch&);
};

// The parts of kernels, for tests of their own; no library that is shipped has them.
struct WhiteboxKernels {
  // y[i] = f(x[i]), f32 and f64.
  void (*exp_f32)(int64_t n, const float* x, float* y);
  void (*exp_f64)(int64_t n, const double* x, double* y);
  void (*sigmoid_f32)(int64_t n, const float* x, float* y);
  void (*sigmoid_f64)(int64_t n, const double* x, double* y);
  void (*tanh_f32)(int64_t n, const float* x, float* y);
  void (*tanh_f64)(int64_t n, const double* x, double* y);
  // Round trips through the storage types.
  void (*to_f32[kDTypes])(int64_t n, const void* x, float* y);    // not for f64
  void (*from_f32[kDTypes])(int64_t n, const float* x, void* y);  // not for f64
  // c[M, N] = a[M, K] b[K, N], all row-major and contiguous, one thread, through the packed panels.
  void (*gemm_f32)(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c);
  // The same product with `a` given transposed ([K, M]): the form of the weight gradients.
  void (*gemm_tn_f32)(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c);
};

// All kernels of one instruction set.
struct Engine {
  const char* name;
  int vector_bytes;
  Kernels kernels[kDTypes];
  const WhiteboxKernels* whitebox;  // null unless compiled with FASTGRU_WHITEBOX
};

const Engine* engine_generic();
const Engine* engine_avx2();  // null where this build has no such code (other architectures)
const Engine* engine_avx512();
const Engine* engine_avx512_bf16();  // its bf16 kernels only

}  // namespace fastgru
