// Operators of attention on the CPU, on torch tensors; schemas in fastgru/ops/attention/schema.py.
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

std::tuple<Tensor, Tensor, Tensor> attention(FASTGRU_ATTENTION_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const OptionalTensor& grad_output,
                                                              const OptionalTensor& grad_lse,
                                                              FASTGRU_ATTENTION_PARAMETERS, const Tensor& output,
                                                              const Tensor& statistics, bool need_bias_grad);

// The same without options: passing fifteen arguments through torch's dispatcher takes longer than a small problem.
// The mask has one to four dimensions. Query has the heads of key, or with `grouped` a multiple of them.
#define FASTGRU_PLAIN_PARAMETERS                                                           \
  const Tensor &query, const Tensor &key, const Tensor &value, const OptionalTensor &mask, \
      std::optional<double> scale, bool causal, bool bottom_right, bool grouped

std::tuple<Tensor, Tensor> plain_attention(FASTGRU_PLAIN_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor> plain_attention_backward(const Tensor& grad_output, FASTGRU_PLAIN_PARAMETERS,
                                                            const Tensor& output, const Tensor& statistics);

}  // namespace fastgru
