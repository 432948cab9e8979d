// The tensor layer's tools: dtypes, fresh tensors; with them threads and scratch memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "memory.h"
#include "threads/pool.h"

namespace fastgru {

using torch::stable::Tensor;

DType tensor_dtype(const Tensor& t);

// CPU tensors from torch's allocator, without gaps. (torch::stable::new_empty looks its operator up by name on every
// call, which costs a microsecond: a third of a streaming step.)
Tensor strided_tensor(int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& strides);
Tensor contiguous_tensor(int32_t dtype, const std::vector<int64_t>& size);

}  // namespace fastgru
