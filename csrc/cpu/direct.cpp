// The functions of the fast path: scratch memory and threads around the engine's kernels.
#include "direct.h"

#include <cstring>

#include "gru/op.h"
#include "isa.h"
#include "tensor.h"

namespace fastgru {
namespace {

constexpr size_t kElementBytes[kDTypes] = {4, 8, 2, 2};

// Errors are not reported here: the caller then calls the operator, which throws them again.
template <class Call>
bool returns(const Call& call) {
  try {
    call();
    return true;
  } catch (...) {
    return false;
  }
}

bool gru_forward(const GruForward& given, DType dtype) {
  return returns([&] {
    Arena arena;
    const Scratch scratch = arena.scratch();
    GruForward f = given;
    const size_t bytes = f.s.D * f.s.B * f.s.H * kElementBytes[int(dtype)];
    if (!f.s.h0) f.s.h0 = std::memset(scratch.allocate(scratch.context, bytes), 0, bytes);
    if (!f.h_n) f.h_n = scratch.allocate(scratch.context, bytes);
    current_kernels(dtype).gru_forward(f, torch_threads(), scratch);
  });
}

bool gru_backward(const GruBackward& given, DType dtype) {
  return returns([&] {
    Arena arena;
    GruBackward b = given;
    b.chunk_tokens = cpu_chunk_tokens();
    current_kernels(dtype).gru_backward(b, torch_threads(), arena.scratch());
  });
}

bool attention_forward(const AttentionForward& f, DType dtype) {
  return returns([&] {
    Arena arena;
    current_kernels(dtype).attention_forward(f, torch_threads(), arena.scratch());
  });
}

bool attention_backward(const AttentionBackward& b, DType dtype) {
  return returns([&] {
    Arena arena;
    current_kernels(dtype).attention_backward(b, torch_threads(), arena.scratch());
  });
}

constexpr DirectCalls kCalls{gru_forward, gru_backward, attention_forward, attention_backward, prepare_fresh};

}  // namespace
}  // namespace fastgru

const fastgru::DirectCalls* fastgru_direct_calls() { return &fastgru::kCalls; }
