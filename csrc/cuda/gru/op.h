// What fastgru/backends/cuda.py launches, as fastgru/ops/schema.py says.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

namespace fastgru {
namespace cuda {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void upload_table(const Tensor& host, const Tensor& device);

// The reason why nothing was launched, or "".
std::string loop_forward(const Tensor& projected, const Tensor& w_hh, const OptionalTensor& b_ih,
                         const OptionalTensor& b_hh, const Tensor& hx, const OptionalTensor& table, int64_t steps,
                         bool tf32, std::string loop, const Tensor& output, const Tensor& h_n,
                         const OptionalTensor& gates);
std::string loop_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& w_hh,
                          const Tensor& previous, const Tensor& gates, const OptionalTensor& table, int64_t steps,
                          bool tf32, std::string loop, const Tensor& grad_gates, const Tensor& grad_hx);
std::string why_not(int64_t device, torch::headeronly::ScalarType dtype, int64_t hidden, int64_t batch,
                    int64_t directions, bool tf32, std::string loop);

void previous_states(const Tensor& output, const Tensor& hx, const OptionalTensor& table, int64_t steps,
                     const Tensor& previous);
void gates(const Tensor& projected, const Tensor& recurrent, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
           const Tensor& gates);

}  // namespace cuda
}  // namespace fastgru
