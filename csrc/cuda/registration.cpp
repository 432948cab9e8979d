// The operators of the CUDA part, in the wheels that have one.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

#include "cubin_launch.h"
#include "device.h"
#include "gru/op.h"

namespace fastgru {
namespace {

std::tuple<int64_t, int64_t> cuda_versions() { return {cuda::runtime_version(), cuda::driver_version()}; }

int64_t cuda_code_architecture(int64_t device) {
  const char* error = nullptr;
  const int architecture = cuda::code_architecture(int(device), &error);
  STD_TORCH_CHECK(error == nullptr, "fastgru: no code of this build runs on CUDA device ", device, ": ", error);
  return architecture;
}

}  // namespace
}  // namespace fastgru

STABLE_TORCH_LIBRARY_IMPL(fastgru, CompositeExplicitAutograd, m) {
  m.impl("cuda_versions", TORCH_BOX(&fastgru::cuda_versions));
  m.impl("cuda_code_architecture", TORCH_BOX(&fastgru::cuda_code_architecture));
  m.impl("cuda_gru_why_not", TORCH_BOX(&fastgru::cuda::why_not));
  m.impl("cuda_load", TORCH_BOX(&fastgru::cuda_load));
  m.impl("cuda_launch", TORCH_BOX(&fastgru::cuda_launch));
}

STABLE_TORCH_LIBRARY_IMPL(fastgru, CUDA, m) {
  m.impl("cuda_upload", TORCH_BOX(&fastgru::cuda::upload_table));
  m.impl("cuda_gru_loop_forward", TORCH_BOX(&fastgru::cuda::loop_forward));
  m.impl("cuda_gru_loop_backward", TORCH_BOX(&fastgru::cuda::loop_backward));
  m.impl("cuda_gru_previous_states", TORCH_BOX(&fastgru::cuda::previous_states));
  m.impl("cuda_gru_gates", TORCH_BOX(&fastgru::cuda::gates));
}
