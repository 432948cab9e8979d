// Makes CPU tensors through torch's stable C interface and tells their dtype.
#include "tensor.h"

#include <dlfcn.h>

#include <cstring>

namespace fastgru {

DType tensor_dtype(const Tensor& t) {
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

namespace {

// What torch's last exception on this thread said. Torch has a function for it since 2.13; this library needs 2.10.
const char* torch_error() {
  using What = const char* (*)();
  static const auto what = reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return what ? what() : "DefaultCPUAllocator: can't allocate memory";
}

}  // namespace

Tensor strided_tensor(int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  // The sizes are sound: what can fail is the allocator, whose own words these are.
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype,
                                           aoti_torch_device_type_cpu(), 0, &handle) == 0,
                  torch_error());
  Tensor t(handle);
  const size_t bytes = t.numel() * t.element_size();
  prepare_fresh(t.mutable_data_ptr(), bytes);
  if (poisoned()) std::memset(t.mutable_data_ptr(), 0xff, bytes);
  return t;
}

Tensor contiguous_tensor(int32_t dtype, const std::vector<int64_t>& size) {
  std::vector<int64_t> strides(size.size());
  int64_t elements = 1;
  for (size_t i = size.size(); i-- > 0; elements *= size[i] ? size[i] : 1) strides[i] = elements;
  return strided_tensor(dtype, size, strides);
}

}  // namespace fastgru
