// Looks torch's current CUDA stream up at run time, because only CUDA builds of torch have the function.
#include "stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastgru {
namespace cuda {

CUstream_st* current_stream(int device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    // torch's CUDA library need not be in the scope in which this one resolves its symbols.
    void* library = found == nullptr ? dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    if (library != nullptr) found = dlsym(library, name);
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "fastgru: this torch has no CUDA streams; install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "fastgru: torch has no current stream of CUDA device ", device);
  return static_cast<CUstream_st*>(stream);
}

}  // namespace cuda
}  // namespace fastgru
