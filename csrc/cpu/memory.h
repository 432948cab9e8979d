// Manages the memory of the CPU operators: scratch memory of a call, and advice for fresh tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernel_table.h"

namespace fastgru {

// Asks for large pages under a fresh tensor that fills some: what an operator, or the fast path, returns or saves.
void prepare_fresh(void* memory, size_t bytes);

// For tests: fill fresh memory with NaN.
void cpu_set_poison(bool on);
bool poisoned();

// Gives back the scratch memory that threads keep for their next call.
void cpu_release_memory();

// Memory straight from the system: what is given back is free at once, not kept by an allocator between its blocks.
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
  std::optional<torch::stable::Tensor> fallback_;
};

// Scratch memory of one call, cut from a slab that the thread keeps for its next call: up to 64 MiB, until
// cpu_release_memory() or the thread's end.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;

  Scratch scratch() {
    return {this, [](void* self, size_t bytes) { return static_cast<Arena*>(self)->allocate(bytes); }};
  }

 private:
  void* allocate(size_t bytes);

  std::unique_ptr<Slab> slab_;
  size_t wanted_;             // bytes of a new slab
  size_t used_ = 0, at_ = 0;  // at_: within the last slab
  std::vector<Slab> overflow_;
};

}  // namespace fastgru
