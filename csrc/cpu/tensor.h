// What the tensor layer of an operator needs: dtypes, threads, fresh tensors and scratch memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/gru_kernels.h"

namespace fastgru {

using torch::stable::Tensor;

inline DType tensor_dtype(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "fastgru: the cpu backend computes in float32, float64, bfloat16 and float16 only");
  }
}

inline Parallel torch_threads() {
  const auto run = [](int n, void (*body)(int, void*), void* arg) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(int(i), arg);
    });
  };
  return {int(torch::stable::get_num_threads()), run};
}

// Tests set this: memory that nothing has been written to then reads as NaN.
inline std::atomic<bool>& tensor_poison() {
  static std::atomic<bool> on{false};
  return on;
}

// A CPU tensor from torch's allocator, without gaps.
inline Tensor strided_tensor(int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  if (tensor_poison().load(std::memory_order_relaxed))
    std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());
  return t;
}

inline Tensor contiguous_tensor(int32_t dtype, const std::vector<int64_t>& size) {
  std::vector<int64_t> strides(size.size());
  int64_t elements = 1;
  for (size_t i = size.size(); i-- > 0; elements *= size[i] ? size[i] : 1) strides[i] = elements;
  return strided_tensor(dtype, size, strides);
}

// Scratch memory of one call.
class TensorScratch {
 public:
  Scratch scratch() {
    return {this, [](void* self, size_t bytes) {
              auto& tensors = static_cast<TensorScratch*>(self)->tensors_;
              tensors.push_back(contiguous_tensor(aoti_torch_dtype_uint8(), {int64_t(bytes)}));
              return tensors.back().mutable_data_ptr();
            }};
  }

 private:
  std::vector<Tensor> tensors_;
};

}  // namespace fastgru
