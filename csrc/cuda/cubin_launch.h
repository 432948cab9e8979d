// Loads and launches kernels that were compiled ahead of time (cubins), through the CUDA driver. No CUDA library is
// linked: libcuda and torch's current stream are looked up at the first launch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastgru {

// The kinds of a kernel's arguments in `plan`, and the numbers that follow each:
//   Map       a TMA descriptor of tensors[n]: n, CUtensorMapDataType, CUtensorMapSwizzle, four sizes of the box of one
//             copy, outermost first. The tensor is 4-D; its last stride is 1, the others obey TMA's rules. Triton
//             passes the descriptor, the sizes (int32) and the strides (int64).
//   Pointer   n: the data of tensors[n]; null for -1.
//   Integer   an int32.
//   Number    n: numbers[n] as float32.
enum class Argument : int64_t { Map, Pointer, Integer, Number };

// Loads `symbol` of the cubin at `path` once for each device, and launches `programs` blocks of `threads` threads with
// `shared` bytes of dynamic shared memory on torch's current stream. `device` has to be the current device.
// `cooperative`: the launch fails unless all blocks are resident at once, because they wait for each other.
void cuda_launch(std::vector<torch::stable::Tensor> tensors, std::string path, std::string symbol, int64_t device,
                 int64_t programs, bool cooperative, int64_t threads, int64_t shared, std::vector<int64_t> plan,
                 std::vector<double> numbers);

// Loads a kernel, and raises if that fails.
void cuda_load(std::string path, std::string symbol, int64_t device, int64_t shared);

}  // namespace fastgru
