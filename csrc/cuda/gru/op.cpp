// The GRU's operators of the CUDA backend: checks tensors, chooses a kernel for the recurrence, and launches it on
// torch's device and stream. fastgru/ops has the schemas.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cluster.h"
#include "cuda/stream.h"
#include "grid.h"
#include "tokens.h"
#include "types.h"

namespace fastgru {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes a tensor's device current, as the kernels need it, and restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t status) {
    STD_TORCH_CHECK(status == cudaSuccess, "fastgru: CUDA: ", cudaGetErrorString(status));
  }
  int before_ = 0;
};

bool precision_of(ScalarType dtype, bool tf32, Precision* precision) {
  *precision = dtype == ScalarType::BFloat16 ? Precision::bf16
               : dtype == ScalarType::Half   ? Precision::f16
                                             : Precision::tf32;
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || (dtype == ScalarType::Float && tf32);
}

constexpr char kNeedsTF32[] =
    "it multiplies float32 as TF32, which torch.backends.cuda.matmul.fp32_precision does not allow (it does when set "
    "to "
    "'tf32')";

struct Size {
  int H, B, D;
  Precision precision;
  int device;
};

// A kernel for the recurrence.
struct Loop {
  const char* name;
  const char* (*why_not)(const Size&);
  size_t (*workspace)(const Size&);
  const char* (*forward)(const GruForwardLoop&, void* workspace, CUstream_st*);
  const char* (*backward)(const GruBackwardLoop&, void* workspace, CUstream_st*);
};

// In order of preference: an exchange within a cluster has a shorter latency than one through global memory.
constexpr Loop kLoops[] = {
    {"cluster", [](const Size& s) { return gru_cluster_why_not(s.H, s.B, s.precision, s.device); },
     [](const Size&) { return size_t(0); },
     [](const GruForwardLoop& loop, void*, CUstream_st* stream) { return gru_cluster_forward(loop, stream); },
     [](const GruBackwardLoop& loop, void*, CUstream_st* stream) { return gru_cluster_backward(loop, stream); }},
    {"grid", [](const Size& s) { return gru_grid_why_not(s.H, s.B, s.D, s.precision, s.device); },
     [](const Size& s) { return gru_grid_workspace(s.H, s.B, s.D, s.precision); }, gru_grid_forward, gru_grid_backward},
};

// Runs the first loop that supports a problem; `name`, unless empty, admits only the loop of that name. Returns "", or
// the reasons why none ran.
template <class Run>
std::string first_that_runs(const Size& size, const std::string& name, Run run) {
  std::string reasons;
  bool known = name.empty();
  for (const Loop& loop : kLoops) {
    if (!name.empty() && name != loop.name) continue;
    known = true;
    const char* reason = loop.why_not(size);
    if (reason == nullptr) reason = run(loop);
    if (reason == nullptr) return "";
    reasons += (reasons.empty() ? "" : "; ") + std::string(loop.name) + " kernel: " + reason;
  }
  STD_TORCH_CHECK(known, "fastgru: there is no kernel '", name, "' for the recurrence");
  return reasons;
}

// Memory of one call, from torch's allocator. It may be freed before the kernel has run: the allocator reuses it only
// on the same stream.
Tensor scratch(size_t bytes, int device) {
  const int64_t size = int64_t(bytes), stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

int small(int64_t size) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), "fastgru: ", size, " rows are more than the cuda ",
                  "backend can number (2147483647); split the batch");
  return int(size);
}

void check(const Tensor& t, const char* name, const Tensor& like, std::vector<int64_t> size) {
  bool fits = t.is_contiguous() && t.scalar_type() == like.scalar_type() && t.is_cuda() &&
              t.get_device_index() == like.get_device_index() && t.dim() == int64_t(size.size());
  for (size_t i = 0; fits && i < size.size(); ++i) fits = t.size(int64_t(i)) == size[i];
  STD_TORCH_CHECK(fits, "fastgru: ", name,
                  " does not have the shape, dtype, device or strides that the kernel expects");
}

const void* input(const Tensor& t, const char* name, const Tensor& like, std::vector<int64_t> size) {
  check(t, name, like, std::move(size));
  return t.const_data_ptr();
}

const void* input(const OptionalTensor& t, const char* name, const Tensor& like, std::vector<int64_t> size) {
  return t ? input(*t, name, like, std::move(size)) : nullptr;
}

void* result(const Tensor& t, const char* name, const Tensor& like, std::vector<int64_t> size) {
  check(t, name, like, std::move(size));
  return t.mutable_data_ptr();
}

const int32_t* table_of(const OptionalTensor& table, int64_t steps, const Tensor& like, int64_t batch) {
  if (!table) return nullptr;
  STD_TORCH_CHECK(table->is_contiguous() && table->scalar_type() == ScalarType::Int && table->is_cuda() &&
                      table->get_device_index() == like.get_device_index() && table->numel() == steps + 1 + batch,
                  "fastgru: the table of a packed batch must be int32 [T + 1 + B] on the device of hx");
  return static_cast<const int32_t*>(table->const_data_ptr());
}

void raise(const char* error) { STD_TORCH_CHECK(error == nullptr, "fastgru: CUDA: ", error); }

// --- Operators

void upload_table(const Tensor& host, const Tensor& device) {
  STD_TORCH_CHECK(!host.is_cuda() && device.is_cuda() && host.scalar_type() == ScalarType::Int &&
                      device.scalar_type() == ScalarType::Int && host.is_contiguous() && device.is_contiguous() &&
                      host.numel() == device.numel(),
                  "fastgru: expected an int32 vector on the CPU and one of the same size on the GPU");
  const int index = device.get_device_index();
  const DeviceGuard guard(index);
  raise(upload(static_cast<const int32_t*>(host.const_data_ptr()), static_cast<int32_t*>(device.mutable_data_ptr()),
               small(host.numel()), current_stream(index)));
}

// Both return the reason why nothing was launched, or "".
std::string loop_forward(const Tensor& projected, const Tensor& w_hh, const OptionalTensor& b_ih,
                         const OptionalTensor& b_hh, const Tensor& hx, const OptionalTensor& table, int64_t steps,
                         bool tf32, std::string loop, const Tensor& output, const Tensor& h_n,
                         const OptionalTensor& gates) {
  STD_TORCH_CHECK(hx.dim() == 3 && hx.is_cuda() && projected.dim() == 2, "fastgru: expected hx [D, B, H] on a GPU");
  const int64_t D = hx.size(0), B = hx.size(1), H = hx.size(2), N = projected.size(0);
  STD_TORCH_CHECK(table || N == steps * B, "fastgru: expected ", steps * B, " rows of all steps, got ", N);
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "fastgru: expected both biases, or none");
  const int device = hx.get_device_index();
  GruForwardLoop f{};
  if (!precision_of(hx.scalar_type(), tf32, &f.precision)) return kNeedsTF32;
  f.T = small(steps), f.B = small(B), f.H = small(H), f.D = small(D), f.N = small(N);
  f.i = input(projected, "projected", hx, {N, D * 3 * H});
  f.w_hh = input(w_hh, "w_hh", hx, {D, 3 * H, H});
  f.b_ih = input(b_ih, "b_ih", hx, {D, 3 * H});
  f.b_hh = input(b_hh, "b_hh", hx, {D, 3 * H});
  f.hx = input(hx, "hx", hx, {D, B, H});
  f.table = table_of(table, steps, hx, B);
  f.output = result(output, "output", hx, {N, D * H});
  f.h_n = result(h_n, "h_n", hx, {D, B, H});
  f.gates = gates ? result(*gates, "gates", hx, {D, N, 4 * gate_stride(f.H)}) : nullptr;
  const DeviceGuard guard(device);
  CUstream_st* stream = current_stream(device);
  const Size size{f.H, f.B, f.D, f.precision, device};
  return first_that_runs(size, loop, [&](const Loop& kernel) {
    return kernel.forward(f, scratch(kernel.workspace(size), device).mutable_data_ptr(), stream);
  });
}

std::string loop_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& w_hh,
                          const Tensor& previous, const Tensor& gates, const OptionalTensor& table, int64_t steps,
                          bool tf32, std::string loop, const Tensor& grad_gates, const Tensor& grad_hx) {
  STD_TORCH_CHECK(grad_hx.dim() == 3 && grad_hx.is_cuda() && previous.dim() == 3,
                  "fastgru: expected grad_hx [D, B, H] and previous [N, D, H] on a GPU");
  const int64_t D = grad_hx.size(0), B = grad_hx.size(1), H = grad_hx.size(2), N = previous.size(0);
  STD_TORCH_CHECK(table || N == steps * B, "fastgru: expected ", steps * B, " rows of all steps, got ", N);
  const int device = grad_hx.get_device_index();
  GruBackwardLoop f{};
  if (!precision_of(grad_hx.scalar_type(), tf32, &f.precision)) return kNeedsTF32;
  f.T = small(steps), f.B = small(B), f.H = small(H), f.D = small(D), f.N = small(N);
  f.grad_output = input(grad_output, "grad_output", grad_hx, {N, D * H});
  f.grad_h_n = input(grad_h_n, "grad_h_n", grad_hx, {D, B, H});
  f.w_hh = input(w_hh, "w_hh", grad_hx, {D, 3 * H, H});
  f.previous = input(previous, "previous", grad_hx, {N, D, H});
  f.gates = input(gates, "gates", grad_hx, {D, N, 4 * gate_stride(f.H)});
  f.table = table_of(table, steps, grad_hx, B);
  f.grad_gates = result(grad_gates, "grad_gates", grad_hx, {N, 4 * D * H});
  f.grad_hx = result(grad_hx, "grad_hx", grad_hx, {D, B, H});
  const DeviceGuard guard(device);
  CUstream_st* stream = current_stream(device);
  const Size size{f.H, f.B, f.D, f.precision, device};
  return first_that_runs(size, loop, [&](const Loop& kernel) {
    return kernel.backward(f, scratch(kernel.workspace(size), device).mutable_data_ptr(), stream);
  });
}

std::string why_not(int64_t device, ScalarType dtype, int64_t hidden, int64_t batch, int64_t directions, bool tf32,
                    std::string loop) {
  Size size{small(hidden), small(batch), small(directions), Precision::bf16, int(device)};
  if (!precision_of(dtype, tf32, &size.precision)) return kNeedsTF32;
  const DeviceGuard guard(size.device);
  return first_that_runs(size, loop, [](const Loop&) { return static_cast<const char*>(nullptr); });
}

void previous_states(const Tensor& output, const Tensor& hx, const OptionalTensor& table, int64_t steps,
                     const Tensor& previous) {
  STD_TORCH_CHECK(hx.dim() == 3 && hx.is_cuda() && previous.dim() == 3, "fastgru: expected hx [D, B, H] on a GPU");
  const int64_t D = hx.size(0), B = hx.size(1), H = hx.size(2), N = previous.size(0);
  STD_TORCH_CHECK(table || N == steps * B, "fastgru: expected ", steps * B, " rows of all steps, got ", N);
  const int device = hx.get_device_index();
  const GruTokens tokens{small(steps), small(B), small(H), small(D), small(N), table_of(table, steps, hx, B)};
  const DeviceGuard guard(device);
  raise(gru_previous_states(tokens, int(hx.element_size()), input(output, "output", hx, {N, D * H}),
                            input(hx, "hx", hx, {D, B, H}), result(previous, "previous", hx, {N, D, H}),
                            current_stream(device)));
}

void gates(const Tensor& projected, const Tensor& recurrent, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
           const Tensor& gates) {
  STD_TORCH_CHECK(recurrent.dim() == 3 && recurrent.is_cuda(), "fastgru: expected recurrent [N, D, 3H] on a GPU");
  const int64_t N = recurrent.size(0), D = recurrent.size(1), H = recurrent.size(2) / 3;
  GruTokens tokens{0, 0, small(H), small(D), small(N), nullptr};
  Precision precision;
  precision_of(recurrent.scalar_type(), true, &precision);
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "fastgru: expected both biases, or none");
  const int device = recurrent.get_device_index();
  const DeviceGuard guard(device);
  raise(gru_gates(tokens, precision, input(projected, "projected", recurrent, {N, D * 3 * H}),
                  input(recurrent, "recurrent", recurrent, {N, D, 3 * H}), input(b_ih, "b_ih", recurrent, {D, 3 * H}),
                  input(b_hh, "b_hh", recurrent, {D, 3 * H}),
                  result(gates, "gates", recurrent, {D, N, 4 * gate_stride(tokens.H)}), current_stream(device)));
}

}  // namespace
}  // namespace cuda
}  // namespace fastgru

STABLE_TORCH_LIBRARY_IMPL(fastgru, CompositeExplicitAutograd, m) {
  m.impl("cuda_gru_why_not", TORCH_BOX(&fastgru::cuda::why_not));
}

STABLE_TORCH_LIBRARY_IMPL(fastgru, CUDA, m) {
  m.impl("cuda_upload", TORCH_BOX(&fastgru::cuda::upload_table));
  m.impl("cuda_gru_loop_forward", TORCH_BOX(&fastgru::cuda::loop_forward));
  m.impl("cuda_gru_loop_backward", TORCH_BOX(&fastgru::cuda::loop_backward));
  m.impl("cuda_gru_previous_states", TORCH_BOX(&fastgru::cuda::previous_states));
  m.impl("cuda_gru_gates", TORCH_BOX(&fastgru::cuda::gates));
}
