// Vectors of the compute types, loads and stores of every storage type. Included inside the namespace of one
// instruction set, within its target region; FASTGRU_VECTOR_BYTES is its register width, and tells the instruction set
// too: 64 is AVX-512, 32 is AVX2 with FMA and F16C. (The compiler reads a whole file before it acts on its target
// pragma, so __AVX512F__ and its like are not defined here.)
//
// Multiply-adds are written out as fma(): together with -ffp-contract=off this fixes the rounding of every expression,
// so a value never depends on which template instance or tile shape produced it.

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

typedef float vf32 __attribute__((vector_size(FASTGRU_VECTOR_BYTES)));
typedef double vf64 __attribute__((vector_size(FASTGRU_VECTOR_BYTES)));
typedef int32_t vi32 __attribute__((vector_size(FASTGRU_VECTOR_BYTES)));
typedef int64_t vi64 __attribute__((vector_size(FASTGRU_VECTOR_BYTES)));
typedef uint32_t vu32 __attribute__((vector_size(FASTGRU_VECTOR_BYTES)));
typedef uint16_t vu16half __attribute__((vector_size(FASTGRU_VECTOR_BYTES / 2)));

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
constexpr int lanes = FASTGRU_VECTOR_BYTES / int(sizeof(C));

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
// Element type in which a product of stored tensors is computed: the compute type, or bf16 itself where the processor
// multiplies it (two neighbouring k at a time, accumulated in float).
#if defined(FASTGRU_NATIVE_BF16)
template <class S>
struct OperandOf {
  typedef compute_t<S> type;
};
template <>
struct OperandOf<bf16> {
  typedef bf16 type;
};
template <class S>
using operand_t = typename OperandOf<S>::type;
#else
template <class S>
using operand_t = compute_t<S>;
#endif
template <class E>
constexpr int kPair = sizeof(E) == 2 ? 2 : 1;  // neighbouring k that one multiply-add takes

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class C>
FASTGRU_INLINE vec<C> splat(C v) {
  return v - vec<C>{};  // a broadcast; -0.0 - 0.0 is -0.0, so the sign of zero is kept
}

FASTGRU_INLINE vf32 fma(vf32 a, vf32 b, vf32 c) {
#if FASTGRU_VECTOR_BYTES == 64
  return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTGRU_VECTOR_BYTES == 32
  return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
FASTGRU_INLINE vf64 fma(vf64 a, vf64 b, vf64 c) {
#if FASTGRU_VECTOR_BYTES == 64
  return (vf64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTGRU_VECTOR_BYTES == 32
  return (vf64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// One multiply-add of a tile: acc + a * b, a[0 .. kPair) the same for all lanes, b[lane][0 .. kPair).
FASTGRU_INLINE vf32 multiply_add(const float* a, vf32 b, vf32 acc) { return fma(splat<float>(*a), b, acc); }
FASTGRU_INLINE vf64 multiply_add(const double* a, vf64 b, vf64 acc) { return fma(splat<double>(*a), b, acc); }
#if defined(FASTGRU_NATIVE_BF16)
FASTGRU_INLINE vf32 multiply_add(const bf16* a, vf32 b, vf32 acc) {
  int32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return (vf32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)(__m512)b);
}
#endif

// The cache lines of p[0 .. n).
template <class S>
FASTGRU_INLINE void prefetch(const S* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + i);
}

// ---- storage -> compute ----

FASTGRU_INLINE vf32 widen(const bf16*, vu16half bits) { return (vf32)(__builtin_convertvector(bits, vu32) << 16); }

FASTGRU_INLINE vf32 widen(const f16*, vu16half bits) {
#if FASTGRU_VECTOR_BYTES == 64
  return (vf32)_mm512_cvtph_ps((__m256i)bits);
#elif FASTGRU_VECTOR_BYTES == 32
  return (vf32)_mm256_cvtph_ps((__m128i)bits);
#else
  // Exponent and mantissa moved into place and scaled by 2^112, which also normalises subnormals exactly.
  const vu32 h = __builtin_convertvector(bits, vu32);
  const vu32 sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  const vu32 finite = (vu32)((vf32)rest * splat<float>(0x1p112f));
  const vu32 special = rest | 0x7f800000u;
  return (vf32)(sign | (rest >= 0x0f800000u ? special : finite));
#endif
}

FASTGRU_INLINE vf32 load(const float* p) {
  vf32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTGRU_INLINE vf64 load(const double* p) {
  vf64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
FASTGRU_INLINE vf32 load(const S* p) {
  vu16half bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return widen(p, bits);
}

// The first n < lanes elements; the others are zero. Touches nothing beyond them.
template <class S>
FASTGRU_INLINE vec<compute_t<S>> load_n(const S* p, int n) {
#if FASTGRU_VECTOR_BYTES == 64
  if constexpr (same<S, float>) return (vf32)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  if constexpr (same<S, double>) return (vf64)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#endif
  S tmp[lanes<compute_t<S>>] = {};
  for (int i = 0; i < n; ++i) tmp[i] = p[i];
  return load(tmp);
}

// ---- compute -> storage, round to nearest even ----

FASTGRU_INLINE vu16half narrow(const bf16*, vf32 v) {
  const vu32 bits = (vu32)v;
  const vu32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu32 quiet = (bits >> 16) | 0x40u;  // a NaN must not round up to infinity
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, vu16half);
}

FASTGRU_INLINE vu16half narrow(const f16*, vf32 v) {
#if FASTGRU_VECTOR_BYTES == 64
  return (vu16half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FASTGRU_VECTOR_BYTES == 32
  return (vu16half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu32 bits = (vu32)v, sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // Normal results: round the mantissa in place. Subnormal results: adding 0.5 aligns the ulp to 2^-24.
  const vu32 normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const vu32 subnormal = (vu32)((vf32)rest + splat<float>(0.5f)) - 0x3f000000u;
  vu32 h = rest < 0x38800000u ? subnormal : normal;
  h = rest >= 0x47800000u ? vu32{} + 0x7c00u : h;
  h = rest > 0x7f800000u ? 0x7e00u | ((rest >> 13) & 0x3ffu) : h;
  return __builtin_convertvector(h | sign, vu16half);
#endif
}

FASTGRU_INLINE void store(float* p, vf32 v) { __builtin_memcpy(p, &v, sizeof v); }
FASTGRU_INLINE void store(double* p, vf64 v) { __builtin_memcpy(p, &v, sizeof v); }
template <class S>
FASTGRU_INLINE void store(S* p, vf32 v) {
  const vu16half bits = narrow(p, v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first n < lanes elements only.
template <class S>
FASTGRU_INLINE void store_n(S* p, vec<compute_t<S>> v, int n) {
#if FASTGRU_VECTOR_BYTES == 64
  if constexpr (same<S, float>) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  if constexpr (same<S, double>) return _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#endif
  S tmp[lanes<compute_t<S>>];
  store(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}

// Whole vector or its first n elements.
template <class S>
FASTGRU_INLINE vec<compute_t<S>> load_upto(const S* p, int n) {
  return n >= lanes<compute_t<S>> ? load(p) : load_n(p, n);
}
template <class S>
FASTGRU_INLINE void store_upto(S* p, vec<compute_t<S>> v, int n) {
  if (n >= lanes<compute_t<S>>)
    store(p, v);
  else
    store_n(p, v, n);
}

template <class S>
FASTGRU_INLINE compute_t<S> load_one(const S* p) {
  if constexpr (sizeof(S) == 2)
    return load_n(p, 1)[0];
  else
    return *p;
}
template <class S>
FASTGRU_INLINE void store_one(S* p, compute_t<S> v) {
  if constexpr (sizeof(S) == 2)
    store_n(p, splat<float>(v), 1);
  else
    *p = v;
}
