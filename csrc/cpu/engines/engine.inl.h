// Builds one complete engine in the target region of an instruction set, from which it is included.
// FASTGRU_ISA is its name (also the namespace), FASTGRU_SIMD the file of its instruction set.
// Nothing of the standard library may be instantiated here: the linker keeps one copy of an inline function for the
// whole program, and it must not be the one compiled for the newest machine.

#define FASTGRU_STRING_(x) #x
#define FASTGRU_STRING(x) FASTGRU_STRING_(x)

namespace fastgru {
namespace FASTGRU_ISA {

// clang-format off: each needs the ones before it
#include FASTGRU_SIMD
#include "../simd/common.inl.h"
#include "../simd/math.inl.h"
#include "../simd/permute.inl.h"
#include "../simd/reduce.inl.h"
#include "../gemm/tile.inl.h"
#include "../gemm/panel.inl.h"
#include "../gemm/pack.inl.h"
#include "../gemm/dot.inl.h"
#include "../gemm/lanes.inl.h"
#include "../scratch.inl.h"
#include "../threads/region.inl.h"
#include "../gru/cell.inl.h"
#include "../gru/plan.inl.h"
#include "../gru/weights.inl.h"
#include "../gru/forward.inl.h"
#include "../gru/single_step.inl.h"
#include "../gru/few_units.inl.h"
#include "../gru/backward.inl.h"
#include "../gru/recompute.inl.h"
#include "../gru/backward_products.inl.h"
#include "../gru/few_units_backward.inl.h"
#include "../gru/entry.inl.h"
#include "../gemm/strip.inl.h"
#include "../attention/exponential.inl.h"
#include "../attention/dropout.inl.h"
#include "../attention/visibility.inl.h"
#include "../attention/scores.inl.h"
#include "../attention/operands.inl.h"
#include "../attention/online_softmax.inl.h"
#include "../attention/forward.inl.h"
#include "../attention/few_queries.inl.h"
#include "../attention/backward.inl.h"
#include "../attention/bias_gradient.inl.h"
// clang-format on

// One list for every storage type: a kernel that is missing here is missing everywhere.
template <class S>
static constexpr Kernels kernels() {
  return {gru_forward<S>, gru_backward<S>, attention_forward<S>, attention_backward<S>};
}

#if defined(FASTGRU_NATIVE_BF16)

// Only what the instruction changes; isa.cpp takes the rest from the AVX-512 engine.
static const Engine engine = {FASTGRU_STRING(FASTGRU_ISA), kVectorBytes, {{}, {}, kernels<bf16>(), {}}, nullptr};

#else

#if defined(FASTGRU_WHITEBOX)
#include "whitebox.inl.h"
static constexpr const WhiteboxKernels* whitebox = &whitebox_kernels;
#else
static constexpr const WhiteboxKernels* whitebox = nullptr;
#endif

static const Engine engine = {
    FASTGRU_STRING(FASTGRU_ISA),
    kVectorBytes,
    {kernels<float>(), kernels<double>(), kernels<bf16>(), kernels<f16>()},
    whitebox,
};

#endif

}  // namespace FASTGRU_ISA
}  // namespace fastgru
