// Names the precisions of matrix products on the GPU.
#pragma once

namespace fastgru {
namespace cuda {

// The dtype of all arrays. tf32 stands for float32 arrays, rounded to TF32 as operands of products.
enum class Precision { bf16, f16, tf32 };

}  // namespace cuda
}  // namespace fastgru
