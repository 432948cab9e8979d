// Operators of attention on the CPU: checks tensors, fills the structs of types.h, and calls the engine.
#include "op.h"

#include <cmath>
#include <string>

#include "../isa.h"
#include "../tensor.h"
#include "types.h"

namespace fastgru {
namespace {

using torch::headeronly::ScalarType;

int32_t dtype_code(const Tensor& t) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// [B, H, L, columns], laid out as `like`: heads before positions in memory, or after them.
Tensor empty_like_layout(const Tensor& like, int64_t columns) {
  const int64_t B = like.size(0), H = like.size(1), L = like.size(2);
  const auto at_least_1 = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t row = at_least_1(columns);
  if (like.stride(1) < like.stride(2))
    return strided_tensor(dtype_code(like), {B, H, L, columns},
                          {row * at_least_1(H) * at_least_1(L), row, row * at_least_1(H), 1});
  return contiguous_tensor(dtype_code(like), {B, H, L, columns});
}

Heads heads(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)}; }

// Checked arguments of both passes. `held` keeps alive the tensors that `s` points into, copies among them.
struct Problem {
  std::vector<Tensor> held;
  AttentionShape s{};
  DType dtype;
  int32_t compute_dtype;

  Problem(FASTGRU_ATTENTION_PARAMETERS) : dtype(tensor_dtype(query)) {
    held.reserve(16);
    compute_dtype = dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "fastgru: expected [B, H, L, D]");
    s.B = query.size(0), s.Hq = query.size(1), s.Lq = query.size(2), s.D = query.size(3);
    s.Hk = key.size(1), s.Lk = key.size(2), s.Dv = value.size(3);
    STD_TORCH_CHECK(key.size(0) == s.B && value.size(0) == s.B && key.size(3) == s.D && value.size(1) == s.Hk &&
                        value.size(2) == s.Lk && s.Hk > 0 && s.Hq % s.Hk == 0,
                    "fastgru: query, key and value do not fit each other");
    s.q = take_heads(query), s.k = take_heads(key), s.v = take_heads(value);
    if (bias) s.bias = per_score(*bias, query.scalar_type());
    if (mask) s.mask = per_score(*mask, ScalarType::Bool);
    if (q_lengths) s.q_lengths = lengths("q_lengths", *q_lengths, s.Lq);
    if (k_lengths) s.k_lengths = lengths("k_lengths", *k_lengths, s.Lk);
    if (alibi_slopes) {
      const Tensor slopes = hold(*alibi_slopes);
      STD_TORCH_CHECK(dtype_code(slopes) == compute_dtype && slopes.dim() == 2 && slopes.size(1) == s.Hq &&
                          (slopes.size(0) == 1 || slopes.size(0) == s.B),
                      "fastgru: alibi_slopes must be [B or 1, Hq] of the type computed in");
      s.slopes = slopes.const_data_ptr();
      s.slope_stride = slopes.size(0) == 1 ? 0 : s.Hq;
    }
    if (dropout_seed) {
      STD_TORCH_CHECK(dropout_seed->scalar_type() == ScalarType::Long && dropout_seed->numel() == 1,
                      "fastgru: dropout_seed must be one int64");
      held.push_back(*dropout_seed);
      s.seed = static_cast<const int64_t*>(dropout_seed->const_data_ptr());
      // As Python's round(): half to even, in the default rounding mode.
      const double below = std::nearbyint(dropout_p * 4294967296.0);
      s.drop_below = below >= 4294967295.0 ? 4294967295u : uint32_t(below);
      s.dropout_p = dropout_p;
    }
    s.scale = scale, s.softcap = softcap;
    s.window_left = window_left, s.window_right = window_right, s.bottom_right = bottom_right;
  }

  Tensor hold(const Tensor& t) {
    held.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return held.back();
  }

  Heads take_heads(const Tensor& t) {
    STD_TORCH_CHECK(tensor_dtype(t) == dtype, "fastgru: query, key, value and gradients must have one dtype");
    held.push_back(t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t));
    return heads(held.back());
  }

  PerScore per_score(const Tensor& t, ScalarType type) {
    const int64_t whole[4] = {s.B, s.Hq, s.Lq, s.Lk}, dims = t.dim();
    STD_TORCH_CHECK(t.scalar_type() == type && dims >= 1 && dims <= 4,
                    "fastgru: bias or mask has a wrong dtype or rank");
    held.push_back(t.size(dims - 1) == 1 || t.stride(dims - 1) == 1 ? t : torch::stable::contiguous(t));
    const Tensor& own = held.back();
    int64_t stride[4] = {};
    for (int64_t d = 4 - dims; d < 4; ++d) {
      const int64_t size = own.size(d - 4 + dims);
      STD_TORCH_CHECK(size == 1 || size == whole[d], "fastgru: bias or mask has a wrong shape");
      stride[d] = size == 1 ? 0 : own.stride(d - 4 + dims);
    }
    return {own.const_data_ptr(), stride[0], stride[1], stride[2], stride[3]};
  }

  const int64_t* lengths(const char* name, const Tensor& t, int64_t most) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == s.B, "fastgru: ", name,
                    " must be int64 [B]");
    const auto* numbers = static_cast<const int64_t*>(hold(t).const_data_ptr());
    for (int64_t b = 0; b < s.B; ++b)
      STD_TORCH_CHECK(numbers[b] >= 0 && numbers[b] <= most, name, " must lie in [0, ", most, "], got ", numbers[b]);
    return numbers;
  }
};

#define FASTGRU_ATTENTION_ARGUMENTS                                                                           \
  query, key, value, bias, mask, q_lengths, k_lengths, alibi_slopes, dropout_seed, dropout_p, scale, softcap, \
      window_left, window_right, bottom_right

}  // namespace

namespace {

// Returns output and statistics; writes lse unless null.
std::tuple<Tensor, Tensor> forward(FASTGRU_ATTENTION_PARAMETERS, Tensor* lse) {
  const Problem problem(FASTGRU_ATTENTION_ARGUMENTS);
  const AttentionShape& s = problem.s;
  Tensor output = empty_like_layout(query, s.Dv),
         statistics = contiguous_tensor(problem.compute_dtype, {2, s.B, s.Hq, s.Lq});
  if (lse) *lse = contiguous_tensor(problem.compute_dtype, {s.B, s.Hq, s.Lq});
  Arena arena;
  current_kernels(problem.dtype)
      .attention_forward({s, heads(output), lse ? lse->mutable_data_ptr() : nullptr, statistics.mutable_data_ptr()},
                         torch_threads(), arena.scratch());
  return {output, statistics};
}

// Returns the gradients of query, key and value; writes that of bias to d_bias unless null.
std::tuple<Tensor, Tensor, Tensor> gradients(const OptionalTensor& grad_output, const OptionalTensor& grad_lse,
                                             FASTGRU_ATTENTION_PARAMETERS, const Tensor& output,
                                             const Tensor& statistics, Tensor* d_bias) {
  Problem problem(FASTGRU_ATTENTION_ARGUMENTS);
  const AttentionShape& s = problem.s;
  AttentionBackward b{};
  b.s = s;
  const auto has_shape = [&](const Tensor& t, int64_t columns) {
    return t.dim() == (columns < 0 ? 3 : 4) && t.size(0) == s.B && t.size(1) == s.Hq && t.size(2) == s.Lq &&
           (columns < 0 || t.size(3) == columns);
  };
  STD_TORCH_CHECK(has_shape(output, s.Dv) && (!grad_output || has_shape(*grad_output, s.Dv)) &&
                      (!grad_lse || has_shape(*grad_lse, -1)) && statistics.dim() == 4 && statistics.size(0) == 2 &&
                      statistics.size(1) == s.B && statistics.size(2) == s.Hq && statistics.size(3) == s.Lq,
                  "fastgru: output, statistics and gradients must have the shapes that the forward pass gave them");
  b.out = problem.take_heads(output);
  if (grad_output) b.d_out = problem.take_heads(*grad_output);
  for (const Tensor& t : {statistics, grad_lse ? *grad_lse : statistics})
    STD_TORCH_CHECK(dtype_code(t) == problem.compute_dtype,
                    "fastgru: statistics and the gradient of lse must have the type computed in");
  b.statistics = problem.hold(statistics).const_data_ptr();
  if (grad_lse) b.d_lse = problem.hold(*grad_lse).const_data_ptr();
  Tensor dq = empty_like_layout(query, s.D), dk = empty_like_layout(key, s.D), dv = empty_like_layout(value, s.Dv);
  b.dq = heads(dq), b.dk = heads(dk), b.dv = heads(dv);
  if (d_bias) {
    b.d_bias = d_bias->mutable_data_ptr();
    for (int d = 0; d < 4; ++d) b.d_bias_shape[d] = d_bias->size(d);
  }
  Arena arena;
  current_kernels(problem.dtype).attention_backward(b, torch_threads(), arena.scratch());
  return {dq, dk, dv};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention(FASTGRU_ATTENTION_PARAMETERS) {
  Tensor lse;
  auto [output, statistics] = forward(FASTGRU_ATTENTION_ARGUMENTS, &lse);
  return {output, lse, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const OptionalTensor& grad_output,
                                                              const OptionalTensor& grad_lse,
                                                              FASTGRU_ATTENTION_PARAMETERS, const Tensor& output,
                                                              const Tensor& statistics, bool need_bias_grad) {
  const bool wants_bias = need_bias_grad && bias.has_value();
  std::vector<int64_t> shape = {0};
  if (wants_bias) shape = {bias->size(0), bias->size(1), bias->size(2), bias->size(3)};
  Tensor d_bias = contiguous_tensor(dtype_code(query), shape);
  auto [dq, dk, dv] =
      gradients(grad_output, grad_lse, FASTGRU_ATTENTION_ARGUMENTS, output, statistics, wants_bias ? &d_bias : nullptr);
  return {dq, dk, dv, d_bias};
}

namespace {

double plain_scale(const Tensor& query, const Tensor& key, std::optional<double> scale, bool grouped) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && (grouped || query.size(1) == key.size(1)) && query.size(3) > 0,
                  "fastgru: expected [B, H, L, D], as many heads of query as of key, and D > 0");
  return scale ? *scale : 1 / std::sqrt(double(query.size(3)));
}

#define FASTGRU_OF_PLAIN_ARGUMENTS                                                                                 \
  query, key, value, {}, mask, {}, {}, {}, {}, 0, plain_scale(query, key, scale, grouped), 0, -1, causal ? 0 : -1, \
      bottom_right

}  // namespace

std::tuple<Tensor, Tensor> plain_attention(FASTGRU_PLAIN_PARAMETERS) {
  return forward(FASTGRU_OF_PLAIN_ARGUMENTS, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> plain_attention_backward(const Tensor& grad_output, FASTGRU_PLAIN_PARAMETERS,
                                                            const Tensor& output, const Tensor& statistics) {
  auto [dq, dk, dv] = gradients(grad_output, {}, FASTGRU_OF_PLAIN_ARGUMENTS, output, statistics, nullptr);
  return {dq, dk, dv};
}

}  // namespace fastgru
