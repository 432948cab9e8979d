// Registers the operators of the CUDA part that belong to no family: versions, and launches of cubins.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

#include "cubin_launch.h"
#include "device.h"

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
  m.impl("cuda_load", TORCH_BOX(&fastgru::cuda_load));
  m.impl("cuda_launch", TORCH_BOX(&fastgru::cuda_launch));
}
