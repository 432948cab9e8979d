// Declares the GRU's CPU operators, whose schemas are in fastgru/ops/schema.py, and the switches of the CPU backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fastgru {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define FASTGRU_LAYER_PARAMETERS                                                                             \
  const Tensor &input, const Tensor &hx, const Tensor &w_ih, const Tensor &w_hh, const OptionalTensor &b_ih, \
      const OptionalTensor &b_hh, const OptionalTensor &w_ih_r, const OptionalTensor &w_hh_r,                \
      const OptionalTensor &b_ih_r, const OptionalTensor &b_hh_r, const OptionalTensor &batch_sizes

std::tuple<Tensor, Tensor> gru_infer(FASTGRU_LAYER_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor> gru_train(FASTGRU_LAYER_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(const OptionalTensor& grad_output,
                                                                        const OptionalTensor& grad_h_n,
                                                                        FASTGRU_LAYER_PARAMETERS, const Tensor& output,
                                                                        const OptionalTensor& gates,
                                                                        bool need_input_grad, bool need_weight_grad);

std::string cpu_isa();
std::string cpu_isas();
void cpu_set_isa(std::string name);
void cpu_set_chunk_tokens(int64_t tokens);  // for tests: tokens per chunk of the backward pass, 0 for the usual number
int64_t cpu_chunk_tokens();

}  // namespace fastgru
