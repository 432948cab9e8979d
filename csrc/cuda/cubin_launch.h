// Launches kernels that were compiled ahead of time: cubins, loaded through the driver's own interface. No CUDA library
// is needed to load this one; libcuda, and torch's function for its current stream, are looked for at the first launch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastgru {

// What an argument of a kernel is, in `plan`, and the numbers that follow it there:
//   Map       a TMA descriptor of tensors[n]: n, CUtensorMapDataType, CUtensorMapSwizzle, four sizes of the box of one
//             copy, outermost first. The tensor is 4-D, its last stride 1 and its others such as TMA takes. Triton
//             passes the descriptor, the sizes (int32) and the strides (int64).
//   Pointer   n: the data of tensors[n]; null for -1.
//   Integer   an int32.
//   Number    n: numbers[n] as float32.
enum class Argument : int64_t { Map, Pointer, Integer, Number };

// Loads `symbol` of the cubin at `path` once for each device, and starts `programs` blocks of `threads` threads with
// `shared` bytes of memory on torch's current stream of the current device, which `device` has to be. `cooperative`:
// all of them at the same time, or none, because they wait for each other.
void cuda_launch(std::vector<torch::stable::Tensor> tensors, std::string path, std::string symbol, int64_t device,
                 int64_t programs, bool cooperative, int64_t threads, int64_t shared, std::vector<int64_t> plan,
                 std::vector<double> numbers);

// Loads it, and raises where it cannot.
void cuda_load(std::string path, std::string symbol, int64_t device, int64_t shared);

}  // namespace fastgru
