// Loads cubins through the CUDA driver, encodes TMA descriptors, and passes the arguments in a plan to the kernel.
#include "cubin_launch.h"

#include <cuda.h>
#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>

#include "stream.h"

namespace fastgru {
namespace {

using torch::stable::Tensor;

template <typename Function>
Function find(void* library, const char* name, const char* where) {
  void* found = dlsym(library, name);
  STD_TORCH_CHECK(found != nullptr, "fastgru: ", where, " has no ", name);
  return reinterpret_cast<Function>(found);
}

// The driver's functions, by the names that dlsym knows: cuda.h renames none of these to a _v2.
struct Driver {
  decltype(&cuModuleLoadData) module_load;
  decltype(&cuModuleGetFunction) get_function;
  decltype(&cuFuncSetAttribute) set_attribute;
  decltype(&cuTensorMapEncodeTiled) encode;
  decltype(&cuLaunchKernel) launch;
  decltype(&cuLaunchCooperativeKernel) launch_together;
  decltype(&cuGetErrorString) error_string;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    STD_TORCH_CHECK(library != nullptr, "fastgru: there is no CUDA driver: ", dlerror());
    const char* where = "the CUDA driver";
    module_load = find<decltype(module_load)>(library, "cuModuleLoadData", where);
    get_function = find<decltype(get_function)>(library, "cuModuleGetFunction", where);
    set_attribute = find<decltype(set_attribute)>(library, "cuFuncSetAttribute", where);
    encode = find<decltype(encode)>(library, "cuTensorMapEncodeTiled", where);
    launch = find<decltype(launch)>(library, "cuLaunchKernel", where);
    launch_together = find<decltype(launch_together)>(library, "cuLaunchCooperativeKernel", where);
    error_string = find<decltype(error_string)>(library, "cuGetErrorString", where);
  }

  void check(CUresult result, const char* what) const {
    if (result == CUDA_SUCCESS) return;
    const char* words = nullptr;
    error_string(result, &words);
    STD_TORCH_CHECK(false, "fastgru: ", what, ": ", words == nullptr ? "unknown error" : words);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  STD_TORCH_CHECK(file.good() && !content.empty(), "fastgru: cannot read ", path);
  return content;
}

CUfunction function(const std::string& path, const std::string& symbol, int64_t device, int64_t shared) {
  static std::mutex lock;
  static std::map<std::tuple<std::string, std::string, int64_t>, CUfunction> loaded;
  const std::lock_guard<std::mutex> guard(lock);
  CUfunction& found = loaded[{path, symbol, device}];
  if (found != nullptr) return found;
  const std::string image = read(path);
  CUmodule module = nullptr;
  CUfunction fresh = nullptr;
  driver().check(driver().module_load(&module, image.data()), "the kernel does not load");
  driver().check(driver().get_function(&fresh, module, symbol.c_str()), "the kernel is not in its file");
  // Above 48 KiB a kernel needs this attribute.
  driver().check(driver().set_attribute(fresh, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shared)),
                 "the kernel does not get its shared memory");
  return found = fresh;
}

// The arguments of a launch: their values, in containers that never move them, and their addresses.
class Values {
 public:
  template <typename Value>
  void add(Value value) {
    static_assert(sizeof(Value) <= sizeof(uint64_t), "wider values have a place of their own");
    words_.push_back(0);
    *reinterpret_cast<Value*>(&words_.back()) = value;
    addresses_.push_back(&words_.back());
  }
  CUtensorMap& add_map() {
    maps_.emplace_back();
    addresses_.push_back(&maps_.back());
    return maps_.back();
  }
  void** addresses() { return addresses_.data(); }

 private:
  std::deque<uint64_t> words_;
  std::deque<CUtensorMap> maps_;
  std::vector<void*> addresses_;
};

constexpr int RANK = 4;

void add_map(Values& values, const Tensor& t, int64_t element, int64_t swizzle, const int64_t* box) {
  STD_TORCH_CHECK(t.dim() == RANK && t.stride(RANK - 1) == 1, "fastgru: not a tensor for TMA");
  // TMA numbers axes from the innermost one, and strides are in bytes.
  cuuint64_t sizes[RANK], strides[RANK - 1];
  cuuint32_t boxes[RANK], steps[RANK] = {1, 1, 1, 1};
  for (int n = 0; n < RANK; ++n) {
    sizes[RANK - 1 - n] = cuuint64_t(t.size(n));
    boxes[RANK - 1 - n] = cuuint32_t(box[n]);
    if (n < RANK - 1) strides[RANK - 2 - n] = cuuint64_t(t.stride(n)) * t.element_size();
  }
  driver().check(driver().encode(&values.add_map(), CUtensorMapDataType(element), RANK, t.data_ptr(), sizes, strides,
                                 boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle),
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                 "the driver makes no TMA descriptor of these sizes and strides");
  for (int n = 0; n < RANK; ++n) values.add(int32_t(t.size(n)));
  for (int n = 0; n < RANK; ++n) values.add(int64_t(t.stride(n)));
}

}  // namespace

void cuda_load(std::string path, std::string symbol, int64_t device, int64_t shared) {
  function(path, symbol, device, shared);
}

void cuda_launch(std::vector<Tensor> tensors, std::string path, std::string symbol, int64_t device, int64_t programs,
                 bool cooperative, int64_t threads, int64_t shared, std::vector<int64_t> plan,
                 std::vector<double> numbers) {
  const CUfunction kernel = function(path, symbol, device, shared);
  Values values;
  size_t at = 0;
  const auto next = [&] {
    STD_TORCH_CHECK(at < plan.size(), "fastgru: the plan of arguments ends too early");
    return plan[at++];
  };
  while (at < plan.size()) {
    switch (Argument(next())) {
      case Argument::Map: {
        const Tensor& t = tensors.at(size_t(next()));
        const int64_t element = next(), swizzle = next();
        int64_t box[RANK];
        for (int64_t& size : box) size = next();
        add_map(values, t, element, swizzle, box);
        break;
      }
      case Argument::Pointer: {
        const int64_t n = next();
        values.add(n < 0 ? nullptr : tensors.at(size_t(n)).data_ptr());
        break;
      }
      case Argument::Integer:
        values.add(int32_t(next()));
        break;
      case Argument::Number:
        values.add(float(numbers.at(size_t(next()))));
        break;
      default:
        STD_TORCH_CHECK(false, "fastgru: the plan of arguments is not one");
    }
  }
  // Triton's last two arguments, scratch memory: build_cubins.py refuses kernels that need it.
  values.add(static_cast<void*>(nullptr));
  values.add(static_cast<void*>(nullptr));

  const unsigned blocks = unsigned(programs), size = unsigned(threads), memory = unsigned(shared);
  const CUstream stream = cuda::current_stream(int(device));
  driver().check(cooperative
                     ? driver().launch_together(kernel, blocks, 1, 1, size, 1, 1, memory, stream, values.addresses())
                     : driver().launch(kernel, blocks, 1, 1, size, 1, 1, memory, stream, values.addresses(), nullptr),
                 "the kernel does not start");
}

}  // namespace fastgru
