// The tensor layer of the GRU on the CPU: checks torch tensors, fills the structs of the engine, allocates results.
#include "op.h"

#include <atomic>
#include <string>
#include <vector>

#include "../isa.h"
#include "../tensor.h"
#include "types.h"

namespace fastgru {
namespace {

using torch::headeronly::ScalarType;

// Tests set this: chunks so small that a short sequence has many.
std::atomic<int64_t> chunk_tokens{0};

std::string text(const std::vector<int64_t>& size) {
  std::string all;
  for (const int64_t n : size) all += (all.empty() ? "" : ", ") + std::to_string(n);
  return "[" + all + "]";
}
std::string text(const Tensor& t) {
  std::vector<int64_t> size(t.dim());
  for (size_t i = 0; i < size.size(); ++i) size[i] = t.size(int64_t(i));
  return text(size);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The tensors of a layer, contiguous where the engine needs them so, and the struct that points into them.
struct Layer {
  Tensor input, hx;
  std::vector<Tensor> held;  // copies of weights that were not contiguous
  OptionalTensor batch_sizes;
  int64_t columns;  // of the input; the engine has one where there is none
  GruShape shape{};
  DType dtype;

  Layer(const Tensor& input_, const Tensor& hx_, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
        const OptionalTensor& b_hh, const OptionalTensor& w_ih_r, const OptionalTensor& w_hh_r,
        const OptionalTensor& b_ih_r, const OptionalTensor& b_hh_r, const OptionalTensor& batch_sizes_)
      : input(input_), hx(dense(hx_)), batch_sizes(batch_sizes_), dtype(tensor_dtype(input_)) {
    const bool packed = batch_sizes.has_value();
    STD_TORCH_CHECK(input.dim() == (packed ? 2 : 3) && hx.dim() == 3 && w_ih.dim() == 2 && w_hh.dim() == 2,
                    "fastgru: expected input [T, B, I] (packed: [N, I]), hx [D, B, H] and matrices of weights");
    shape.D = w_ih_r.has_value() ? 2 : 1;
    shape.I = columns = input.size(packed ? 1 : 2);
    shape.H = w_hh.size(1);
    shape.B = hx.size(1);
    STD_TORCH_CHECK(hx.size(0) == shape.D && hx.size(2) == shape.H, "fastgru: expected hx [", shape.D, ", B, ", shape.H,
                    "], got [", hx.size(0), ", ", shape.B, ", ", hx.size(2), "]");
    if (shape.I > 1 && input.stride(packed ? 1 : 2) != 1) input = torch::stable::contiguous(input);
    if (packed) {
      const Tensor& sizes = *batch_sizes;
      STD_TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == ScalarType::Long && sizes.is_contiguous(),
                      "fastgru: batch_sizes must be a contiguous vector of int64 on the CPU");
      shape.T = sizes.size(0);
      shape.batch_sizes = static_cast<const int64_t*>(sizes.const_data_ptr());
      int64_t total = 0;
      for (int64_t t = 0; t < shape.T; ++t) {
        const int64_t rows = shape.batch_sizes[t];
        const int64_t most = t ? shape.batch_sizes[t - 1] : shape.B;
        STD_TORCH_CHECK(rows >= 0 && rows <= most, "fastgru: batch_sizes must not grow, from the batch size on: got ",
                        rows, " at step ", t, " after ", most);
        total += rows;
      }
      STD_TORCH_CHECK(shape.T > 0 && shape.batch_sizes[0] == shape.B && total == input.size(0),
                      "fastgru: batch_sizes begin with ", shape.T > 0 ? shape.batch_sizes[0] : 0, " and add up to ",
                      total, ", expected the batch size ", shape.B, " and the rows of the packed input, ",
                      input.size(0));
      shape.N = input.size(0);
      shape.x_stride_t = 0;
      shape.x_stride_b = input.stride(0);
    } else {
      shape.T = input.size(0);
      STD_TORCH_CHECK(shape.T > 0, "Expected sequence length to be larger than 0 in RNN");
      STD_TORCH_CHECK(input.size(1) == shape.B, "fastgru: input has a batch of ", input.size(1), ", hx of ", shape.B);
      shape.N = shape.T * shape.B;
      shape.x_stride_t = input.stride(0);
      shape.x_stride_b = input.stride(1);
    }
    shape.x = input.const_data_ptr();
    if (shape.I == 0) input_of_one_column();
    check_dtype(hx);
    shape.h0 = hx.const_data_ptr();
    shape.w[0] = weights(w_ih, w_hh, b_ih, b_hh);
    if (shape.D == 2) {
      STD_TORCH_CHECK(w_hh_r.has_value(), "fastgru: w_hh_reverse is missing");
      shape.w[1] = weights(*w_ih_r, *w_hh_r, b_ih_r, b_hh_r);
    }
  }

  // The engine's products need one column at least: here of zeros, with weights of zero.
  void input_of_one_column() {
    held.push_back(torch::stable::fill_(empty({3 * shape.H}), 0));
    shape.I = 1;
    shape.x = held.back().const_data_ptr();
    shape.x_stride_t = shape.x_stride_b = 0;
  }

  void check_dtype(const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == input.scalar_type(), "fastgru: input, hx and weights must have one dtype");
  }

  const void* hold(const Tensor& t, std::initializer_list<int64_t> size) {
    check_dtype(t);
    bool fits = t.dim() == int64_t(size.size());
    for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == size.begin()[i];
    STD_TORCH_CHECK(fits, "fastgru: expected a weight or bias ", text(size), ", got ", text(t));
    if (t.is_contiguous()) return t.const_data_ptr();
    held.push_back(torch::stable::contiguous(t));
    return held.back().const_data_ptr();
  }

  GruWeights weights(const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
    const int64_t rows = 3 * shape.H;
    const void* input_weight = hold(w_ih, {rows, columns});
    return {columns ? input_weight : shape.x, hold(w_hh, {rows, shape.H}), b_ih ? hold(*b_ih, {rows}) : nullptr,
            b_hh ? hold(*b_hh, {rows}) : nullptr};
  }

  Tensor empty(const std::vector<int64_t>& size) const {
    int32_t like;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &like));
    return contiguous_tensor(like, size);
  }
  // One row per token: [T, B, columns], or [N, columns] where the input is packed.
  Tensor empty_tokens(int64_t columns) const {
    return batch_sizes ? empty({shape.N, columns}) : empty({shape.T, shape.B, columns});
  }
  Tensor empty_state() const { return empty({shape.D, shape.B, shape.H}); }
  Tensor empty_gates() const { return empty({shape.D, shape.N, 4 * saved_units(shape.H)}); }
};

void forward(const Layer& layer, const Tensor& output, const Tensor& h_n, const Tensor* gates) {
  if (layer.shape.H == 0) return;
  Arena arena;
  const GruForward f{layer.shape, output.mutable_data_ptr(), h_n.mutable_data_ptr(),
                     gates ? gates->mutable_data_ptr() : nullptr};
  current_kernels(layer.dtype).gru_forward(f, torch_threads(), arena.scratch());
}

}  // namespace

#define FASTGRU_LAYER_ARGUMENTS input, hx, w_ih, w_hh, b_ih, b_hh, w_ih_r, w_hh_r, b_ih_r, b_hh_r, batch_sizes

std::tuple<Tensor, Tensor> gru_infer(FASTGRU_LAYER_PARAMETERS) {
  const Layer layer(FASTGRU_LAYER_ARGUMENTS);
  Tensor output = layer.empty_tokens(layer.shape.D * layer.shape.H), h_n = layer.empty_state();
  forward(layer, output, h_n, nullptr);
  return {output, h_n};
}

std::tuple<Tensor, Tensor, Tensor> gru_train(FASTGRU_LAYER_PARAMETERS) {
  const Layer layer(FASTGRU_LAYER_ARGUMENTS);
  Tensor output = layer.empty_tokens(layer.shape.D * layer.shape.H), h_n = layer.empty_state(),
         gates = layer.empty_gates();
  forward(layer, output, h_n, &gates);
  return {output, h_n, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(const OptionalTensor& grad_output,
                                                                        const OptionalTensor& grad_h_n,
                                                                        FASTGRU_LAYER_PARAMETERS, const Tensor& output,
                                                                        const OptionalTensor& gates,
                                                                        bool need_input_grad, bool need_weight_grad) {
  const Layer layer(FASTGRU_LAYER_ARGUMENTS);
  const GruShape& s = layer.shape;
  const Tensor y = dense(output);
  OptionalTensor saved;
  if (gates) saved = dense(*gates);
  STD_TORCH_CHECK(y.numel() == s.N * s.D * s.H && (!saved || saved->numel() == s.D * s.N * 4 * saved_units(s.H)),
                  "fastgru: output and gates must be what the forward pass returned for this layer");
  OptionalTensor dy, dh_n;
  if (grad_output) dy = dense(*grad_output);
  if (grad_h_n) dh_n = dense(*grad_h_n);
  for (const OptionalTensor& t : {OptionalTensor(y), saved, dy, dh_n})
    if (t) layer.check_dtype(*t);
  STD_TORCH_CHECK((!dy || dy->numel() == y.numel()) && (!dh_n || dh_n->numel() == s.D * s.B * s.H),
                  "fastgru: gradients must have the shapes of output and h_n");

  Tensor dx = need_input_grad ? layer.empty_tokens(layer.columns) : layer.empty({0});
  Tensor dh0 = layer.empty_state();
  const auto weight_grad = [&](const std::vector<int64_t>& size) {
    return layer.empty(need_weight_grad ? size : std::vector<int64_t>{0});
  };
  Tensor dw_ih = weight_grad({s.D, 3 * s.H, layer.columns}), dw_hh = weight_grad({s.D, 3 * s.H, s.H});
  Tensor db_ih = weight_grad({s.D, 3 * s.H}), db_hh = weight_grad({s.D, 3 * s.H});
  if (s.H == 0) return {torch::stable::fill_(dx, 0), dh0, dw_ih, dw_hh, db_ih, db_hh};
  const auto wanted = [](const Tensor& t, bool needed) { return needed ? t.mutable_data_ptr() : nullptr; };
  OptionalTensor of_one_column;
  if (layer.columns == 0) of_one_column = layer.empty({s.D, 3 * s.H});

  Arena arena;
  const GruBackward b{s,
                      dy ? dy->const_data_ptr() : nullptr,
                      dh_n ? dh_n->const_data_ptr() : nullptr,
                      y.const_data_ptr(),
                      saved ? saved->const_data_ptr() : nullptr,
                      wanted(dx, need_input_grad && layer.columns),
                      dh0.mutable_data_ptr(),
                      wanted(of_one_column ? *of_one_column : dw_ih, need_weight_grad),
                      wanted(dw_hh, need_weight_grad),
                      wanted(db_ih, need_weight_grad),
                      wanted(db_hh, need_weight_grad),
                      cpu_chunk_tokens()};
  current_kernels(layer.dtype).gru_backward(b, torch_threads(), arena.scratch());
  return {dx, dh0, dw_ih, dw_hh, db_ih, db_hh};
}

std::string cpu_isa() { return current_engine().name; }
std::string cpu_isas() { return usable_engines(); }
void cpu_set_isa(std::string name) { set_engine(name); }
void cpu_set_chunk_tokens(int64_t tokens) { chunk_tokens.store(tokens); }
int64_t cpu_chunk_tokens() { return chunk_tokens.load(std::memory_order_relaxed); }

}  // namespace fastgru
