// Attention on the CPU, as the schemas in fastgru/ops/attention_schema.py say.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastgru {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define FASTGRU_ATTENTION_PARAMETERS                                                                                   \
  const Tensor &query, const Tensor &key, const Tensor &value, const OptionalTensor &bias, const OptionalTensor &mask, \
      const OptionalTensor &q_lengths, const OptionalTensor &k_lengths, const OptionalTensor &alibi_slopes,            \
      const OptionalTensor &dropout_seed, double dropout_p, double scale, double softcap, int64_t window_left,         \
      int64_t window_right, bool bottom_right

std::tuple<Tensor, Tensor> attention(FASTGRU_ATTENTION_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const OptionalTensor& grad_output,
                                                              const OptionalTensor& grad_lse,
                                                              FASTGRU_ATTENTION_PARAMETERS, const Tensor& output,
                                                              const Tensor& lse, bool need_bias_grad);

}  // namespace fastgru
