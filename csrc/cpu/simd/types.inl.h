// Vector types, storage types and compute types. Each file of an instruction set includes this after its constants:
//   kVectorBytes, kVectorRegisters   the width and the number of vector registers
//   kFusedMultiplyAdd                fma() rounds once
//   kMaskedMemory                    masked_load() and masked_store(), f32 and f64, are defined
//   kClampInstructions               clamp_instructions(), f32, is defined
//   kScaleInstruction                scale_instruction(), f32 and f64, is defined
//   kMultipliesBf16                  multiply_add() takes bf16, in pairs of k
// and defines, besides those: fma() of f32 and f64, widen() and narrow() of f16.
// (The compiler reads a whole file before it acts on its target pragma, so __AVX512F__ and its like are not defined.)

#define FASTGRU_INLINE static inline __attribute__((always_inline))
#define FASTGRU_METHOD inline __attribute__((always_inline))

FASTGRU_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGRU_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
FASTGRU_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float vf32 __attribute__((vector_size(kVectorBytes)));
typedef double vf64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t vi64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vu16half __attribute__((vector_size(kVectorBytes / 2)));

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef vf32 vec;
  typedef vi32 ivec;
  typedef int32_t ielem;
};
template <>
struct Simd<double> {
  typedef vf64 vec;
  typedef vi64 ivec;
  typedef int64_t ielem;
};
template <class C>
using vec = typename Simd<C>::vec;
template <class C>
constexpr int lanes = kVectorBytes / int(sizeof(C));

// Compute type of a storage type.
template <class S>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class S>
using compute_t = typename ComputeOf<S>::type;
template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Element type in which a product of stored tensors is computed: the compute type, or bf16 itself where the processor
// multiplies it (two neighbouring k at a time, accumulated in float).
template <class S, bool>
struct OperandOf {
  typedef compute_t<S> type;
};
template <class S>
struct OperandOf<S, true> {
  typedef S type;
};
template <class S>
using operand_t = typename OperandOf<S, kMultipliesBf16 && same<S, bf16>>::type;
template <class E>
constexpr int kPair = sizeof(E) == 2 ? 2 : 1;  // neighbouring k that one multiply-add takes

template <class C>
FASTGRU_INLINE vec<C> splat(C v) {
  return v - vec<C>{};  // a broadcast; -0.0 - 0.0 is -0.0, so the sign of zero is kept
}
