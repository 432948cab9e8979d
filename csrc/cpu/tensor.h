// What the tensor layer of an operator needs: dtypes, threads, fresh tensors and scratch memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/gru_kernels.h"

namespace fastgru {

using torch::stable::Tensor;

DType tensor_dtype(const Tensor& t);

// Torch's threads.
Parallel torch_threads();

// CPU tensors from torch's allocator, without gaps. (torch::stable::new_empty looks its operator up by name on every
// call, which costs a microsecond: a third of a streaming step.)
Tensor strided_tensor(int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& strides);
Tensor contiguous_tensor(int32_t dtype, const std::vector<int64_t>& size);

// Asks for large pages under a fresh tensor that fills some: what an operator, or the way around it, returns or saves.
void prepare_fresh(void* memory, size_t bytes);

// For tests: fill fresh memory with NaN.
void cpu_set_poison(bool on);

// Memory straight from the system: what is given back is gone at once, not kept by an allocator between its blocks.
class Slab {
 public:
  Slab() = default;
  explicit Slab(size_t bytes);
  Slab(Slab&& other) noexcept { *this = std::move(other); }
  Slab& operator=(Slab&& other) noexcept;
  ~Slab();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  std::optional<Tensor> fallback_;
};

// Scratch memory of one call, cut from a slab that the thread keeps for its next call, unless it is very large.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;

  Scratch scratch() {
    return {this, [](void* self, size_t bytes) { return static_cast<Arena*>(self)->allocate(bytes); }};
  }

 private:
  struct Kept {
    Slab slab;
    size_t wanted = 0;
  };
  static Kept& kept();

  void* allocate(size_t bytes);

  Slab slab_;
  size_t wanted_, used_ = 0, at_ = 0;  // at_: within the last slab
  std::vector<Slab> overflow_;
};

}  // namespace fastgru
