// The tensor layer of the CPU backend: from torch tensors to the structs of the engine and back.
#include "gru_op.h"

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"

namespace fastgru {
namespace {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "fastgru: the cpu backend computes in float32, float64, bfloat16 and float16 only");
  }
}

void run_parallel(int n, void (*body)(int, void*), void* arg) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(int(i), arg);
  });
}

// Where another process holds a core, the thread there comes and goes, and a call waits for it longer than it would
// take alone. After two calls in a row of which a good part was waiting, that is not risked again before so much time
// has passed that the wait could not have been worth much: the thread works alone until then, and after one more such
// call again. (Results do not depend on the number of threads.)
constexpr int64_t kUsualWaitNs = 50'000, kPartOfCall = 4, kTimesAsLong = 8;
thread_local int64_t alone_until_ns = 0;
thread_local bool waited_before = false;

void note_wait(int64_t waited_ns, int64_t total_ns) {
  const bool long_wait = waited_ns > kUsualWaitNs && waited_ns > total_ns / kPartOfCall;
  if (long_wait && waited_before) alone_until_ns = now_ns() + kTimesAsLong * waited_ns;
  waited_before = long_wait;
}

Parallel parallel() {
  const bool alone = alone_until_ns > 0 && now_ns() < alone_until_ns;
  return {alone ? 1 : int(torch::stable::get_num_threads()), run_parallel, note_wait};
}

constexpr size_t kLargePage = size_t(1) << 21;

// Tests set this: memory that nothing has been written to then reads as NaN.
std::atomic<bool> poison{false};
// Likewise: chunks so small that a short sequence has many.
std::atomic<int64_t> chunk_tokens{0};

// Fresh memory costs a page fault per 4 KiB, more than the arithmetic on it. Large pages, where the system gives them
// on request, cost a hundredth of that, and a walk through them does not wait for address translation.
void prefer_large_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  // Advice: where it is not taken, nothing is lost.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A contiguous CPU tensor from torch's allocator. (torch::stable::new_empty looks its operator up by name on every
// call, which costs a microsecond: a third of a streaming step.)
Tensor new_tensor(int32_t dtype, const std::vector<int64_t>& size) {
  std::vector<int64_t> strides(size.size());
  int64_t elements = 1;
  for (size_t i = size.size(); i-- > 0; elements *= size[i] ? size[i] : 1) strides[i] = elements;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  const size_t bytes = t.numel() * t.element_size();
  if (bytes >= 2 * kLargePage) prefer_large_pages(t.mutable_data_ptr(), bytes);
  if (poison.load(std::memory_order_relaxed)) std::memset(t.mutable_data_ptr(), 0xff, bytes);
  return t;
}

// Memory straight from the system: what is given back is gone at once, not kept by an allocator between its blocks.
class Slab {
 public:
  Slab() = default;
  explicit Slab(size_t bytes) {
    // In large pages, if it fills a good part of one: packed weights then lie evenly over the sets of a cache too.
    const bool large = bytes >= kLargePage / 4;
    const size_t unit = large ? kLargePage : 4096;
    bytes_ = (bytes + unit - 1) / unit * unit;
    mapped_ = bytes_ + (large ? kLargePage : 0);
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      // Torch's allocator has the words for it. If it still finds the memory, all is well too.
      fallback_ = new_tensor(aoti_torch_dtype_uint8(), {int64_t(bytes_)});
      data_ = static_cast<char*>(fallback_->mutable_data_ptr());
      return;
    }
    mapping_ = memory;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + unit - 1) / unit * unit;
    data_ = reinterpret_cast<char*>(begin);
    if (large) prefer_large_pages(data_, bytes_);
  }
  Slab(Slab&& other) noexcept { *this = std::move(other); }
  Slab& operator=(Slab&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(fallback_, other.fallback_);
    return *this;
  }
  ~Slab() {
    if (mapping_) munmap(mapping_, mapped_);
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  OptionalTensor fallback_;
};

// Scratch memory of one call, cut from a slab that the thread keeps for its next call (up to kKept bytes of it).
class Arena {
 public:
  Arena() : slab_(std::move(kept().slab)), wanted_(kept().wanted) {}
  ~Arena() {
    // What did not fit shows how large the slab should be.
    kept().wanted = used_ > kKept ? 0 : std::max(wanted_, used_);
    if (used_ <= slab_.bytes()) kept().slab = std::move(slab_);
  }
  Arena(const Arena&) = delete;

  Scratch scratch() {
    return {this, [](void* self, size_t bytes) { return static_cast<Arena*>(self)->allocate(bytes); }};
  }

 private:
  static constexpr size_t kKept = size_t(64) << 20, kFirst = size_t(1) << 17;

  struct Kept {
    Slab slab;
    size_t wanted = 0;
  };
  static Kept& kept() {
    thread_local Kept kept;
    return kept;
  }

  void* allocate(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (!slab_.data()) slab_ = Slab(std::max({wanted_, kFirst, bytes}));
    void* result = slab_.data() + used_;
    if (used_ + bytes > slab_.bytes()) {
      overflow_.emplace_back(bytes);
      result = overflow_.back().data();
    }
    used_ += bytes;
    if (poison.load(std::memory_order_relaxed)) std::memset(result, 0xff, bytes);
    return result;
  }

  Slab slab_;
  size_t wanted_, used_ = 0;
  std::vector<Slab> overflow_;
};

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The tensors of a layer, contiguous where the engine needs them so, and the struct that points into them.
struct Layer {
  Tensor input, hx;
  std::vector<Tensor> held;  // copies of weights that were not contiguous
  OptionalTensor batch_sizes;
  GruShape shape{};
  DType dtype;

  Layer(const Tensor& input_, const Tensor& hx_, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
        const OptionalTensor& b_hh, const OptionalTensor& w_ih_r, const OptionalTensor& w_hh_r,
        const OptionalTensor& b_ih_r, const OptionalTensor& b_hh_r, const OptionalTensor& batch_sizes_)
      : input(input_), hx(dense(hx_)), batch_sizes(batch_sizes_), dtype(dtype_of(input_)) {
    const bool packed = batch_sizes.has_value();
    STD_TORCH_CHECK(input.dim() == (packed ? 2 : 3) && hx.dim() == 3 && w_ih.dim() == 2 && w_hh.dim() == 2,
                    "fastgru: expected input [T, B, I] (packed: [N, I]), hx [D, B, H] and matrices of weights");
    shape.D = w_ih_r.has_value() ? 2 : 1;
    shape.I = input.size(packed ? 1 : 2);
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
    check_dtype(hx);
    shape.h0 = hx.const_data_ptr();
    shape.w[0] = weights(w_ih, w_hh, b_ih, b_hh);
    if (shape.D == 2) {
      STD_TORCH_CHECK(w_hh_r.has_value(), "fastgru: w_hh_reverse is missing");
      shape.w[1] = weights(*w_ih_r, *w_hh_r, b_ih_r, b_hh_r);
    }
  }

  void check_dtype(const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == input.scalar_type(), "fastgru: input, hx and weights must have one dtype");
  }

  const void* hold(const Tensor& t, int64_t rows, int64_t columns) {
    check_dtype(t);
    STD_TORCH_CHECK(t.size(0) == rows && t.dim() == (columns ? 2 : 1) && (!columns || t.size(1) == columns),
                    "fastgru: expected a weight or bias [", rows, columns ? ", " : "",
                    columns ? std::to_string(columns) : "", "], got one of ", t.dim(),
                    " dimensions, the first of size ", t.dim() ? t.size(0) : 0);
    if (t.is_contiguous()) return t.const_data_ptr();
    held.push_back(torch::stable::contiguous(t));
    return held.back().const_data_ptr();
  }

  GruWeights weights(const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
    const int64_t rows = 3 * shape.H;
    return {hold(w_ih, rows, shape.I), hold(w_hh, rows, shape.H), b_ih ? hold(*b_ih, rows, 0) : nullptr,
            b_hh ? hold(*b_hh, rows, 0) : nullptr};
  }

  Tensor empty(const std::vector<int64_t>& size) const {
    int32_t like;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &like));
    return new_tensor(like, size);
  }
  // One row per token: [T, B, columns], or [N, columns] where the input is packed.
  Tensor empty_tokens(int64_t columns) const {
    return batch_sizes ? empty({shape.N, columns}) : empty({shape.T, shape.B, columns});
  }
  Tensor empty_state() const { return empty({shape.D, shape.B, shape.H}); }
  Tensor empty_gates() const { return empty({shape.D, shape.N, 4 * padded()}); }
  int64_t padded() const { return (shape.H + kSavedAlign - 1) / kSavedAlign * kSavedAlign; }
};

void forward(const Layer& layer, const Tensor& output, const Tensor& h_n, const Tensor* gates) {
  Arena arena;
  const GruForward f{layer.shape, output.mutable_data_ptr(), h_n.mutable_data_ptr(),
                     gates ? gates->mutable_data_ptr() : nullptr};
  current_engine().forward[int(layer.dtype)](f, parallel(), arena.scratch());
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
  STD_TORCH_CHECK(y.numel() == s.N * s.D * s.H && (!saved || saved->numel() == s.D * s.N * 4 * layer.padded()),
                  "fastgru: output and gates must be what the forward pass returned for this layer");
  OptionalTensor dy, dh_n;
  if (grad_output) dy = dense(*grad_output);
  if (grad_h_n) dh_n = dense(*grad_h_n);
  for (const OptionalTensor& t : {OptionalTensor(y), saved, dy, dh_n})
    if (t) layer.check_dtype(*t);
  STD_TORCH_CHECK((!dy || dy->numel() == y.numel()) && (!dh_n || dh_n->numel() == s.D * s.B * s.H),
                  "fastgru: gradients must have the shapes of output and h_n");

  Tensor dx = need_input_grad ? layer.empty_tokens(s.I) : layer.empty({0});
  Tensor dh0 = layer.empty_state();
  const auto weight_grad = [&](const std::vector<int64_t>& size) {
    return layer.empty(need_weight_grad ? size : std::vector<int64_t>{0});
  };
  Tensor dw_ih = weight_grad({s.D, 3 * s.H, s.I}), dw_hh = weight_grad({s.D, 3 * s.H, s.H});
  Tensor db_ih = weight_grad({s.D, 3 * s.H}), db_hh = weight_grad({s.D, 3 * s.H});
  const auto wanted = [](const Tensor& t, bool needed) { return needed ? t.mutable_data_ptr() : nullptr; };

  Arena arena;
  const GruBackward b{s,
                      dy ? dy->const_data_ptr() : nullptr,
                      dh_n ? dh_n->const_data_ptr() : nullptr,
                      y.const_data_ptr(),
                      saved ? saved->const_data_ptr() : nullptr,
                      wanted(dx, need_input_grad),
                      dh0.mutable_data_ptr(),
                      wanted(dw_ih, need_weight_grad),
                      wanted(dw_hh, need_weight_grad),
                      wanted(db_ih, need_weight_grad),
                      wanted(db_hh, need_weight_grad),
                      chunk_tokens.load(std::memory_order_relaxed)};
  current_engine().backward[int(layer.dtype)](b, parallel(), arena.scratch());
  return {dx, dh0, dw_ih, dw_hh, db_ih, db_hh};
}

std::string cpu_isa() { return current_engine().name; }
std::string cpu_isas() { return usable_engines(); }
void cpu_set_isa(std::string name) { set_engine(name); }
void cpu_set_poison(bool on) { poison.store(on); }
void cpu_set_chunk_tokens(int64_t tokens) { chunk_tokens.store(tokens); }

}  // namespace fastgru
