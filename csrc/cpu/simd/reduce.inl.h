// Lane operations of vectors: larger of two, exchange of halves, sum and maximum over lanes, lane indices, masks from
// bytes; and stores of a product's operands. Included after permute.inl.h.

template <class C>
FASTGRU_INLINE typename Simd<C>::ivec lane_index() {
  typename Simd<C>::ivec lane;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) lane[i] = i;
  return lane;
}

// The larger of both; b where one is NaN.
FASTGRU_INLINE vf32 larger(vf32 a, vf32 b) {
#if FASTGRU_VECTOR_BYTES == 64
  return (vf32)_mm512_max_ps((__m512)a, (__m512)b);
#elif FASTGRU_VECTOR_BYTES == 32
  return (vf32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
FASTGRU_INLINE vf64 larger(vf64 a, vf64 b) { return a > b ? a : b; }

// v with the halves of every group of 2 D lanes exchanged.
template <class C, int D>
FASTGRU_INLINE vec<C> exchange(vec<C> v) {
  typename Simd<C>::ivec from;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) from[i] = i ^ D;
  return __builtin_shuffle(v, from);
}
// Halves are added first, neighbours last: the order is fixed, so the sum is the same bits everywhere.
template <class C, int D = lanes<C> / 2>
FASTGRU_INLINE C sum_lanes(vec<C> v) {
  v += exchange<C, D>(v);
  if constexpr (D > 1)
    return sum_lanes<C, D / 2>(v);
  else
    return v[0];
}
template <class C, int D = lanes<C> / 2>
FASTGRU_INLINE C max_lanes(vec<C> v) {
  const vec<C> other = exchange<C, D>(v);
  v = larger(other, v);
  if constexpr (D > 1)
    return max_lanes<C, D / 2>(v);
  else
    return v[0];
}

// Stores v as operands of a product, rounded to E. The bf16 instruction rounds to nearest even, as store() does, but
// flushes subnormal numbers to zero.
template <class E>
FASTGRU_INLINE void store_operand(E* p, vec<compute_t<E>> v) {
  store(p, v);
}
#if defined(FASTGRU_NATIVE_BF16)
FASTGRU_INLINE void store_operand(bf16* p, vf32 v) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &half, sizeof half);
}
#endif

// Whether any lane is above zero.
template <class C>
FASTGRU_INLINE bool any_positive(vec<C> v) {
#if FASTGRU_VECTOR_BYTES == 64
  if constexpr (same<C, float>)
    return _mm512_cmp_ps_mask((__m512)v, __m512{}, _CMP_GT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask((__m512d)v, __m512d{}, _CMP_GT_OQ) != 0;
#else
  return max_lanes<C>(v) > C(0);
#endif
}

// V vectors, contiguous. Two bf16 vectors take one instruction.
template <int V, class E>
FASTGRU_INLINE void store_operands(E* p, const vec<compute_t<E>>* v) {
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) store_operand(p + i * lanes<compute_t<E>>, v[i]);
}
#if defined(FASTGRU_NATIVE_BF16)
template <int V>
FASTGRU_INLINE void store_operands(bf16* p, const vf32* v) {
  constexpr int W = lanes<float>;
#pragma GCC unroll 2
  for (int i = 0; i + 1 < V; i += 2) {
    const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)v[i + 1], (__m512)v[i]);
    __builtin_memcpy(p + i * W, &pair, sizeof pair);
  }
  if (V % 2) store_operand(p + (V - 1) * W, v[V - 1]);
}
#endif

// Integers of 32 and 8 bits, one for each lane of C.
template <class C>
struct PerLane {
  typedef uint32_t bits __attribute__((vector_size(4 * lanes<C>)));
  typedef int32_t ints __attribute__((vector_size(4 * lanes<C>)));
  typedef uint8_t bytes __attribute__((vector_size(lanes<C>)));
};

// v in the lanes whose byte is not 0, elsewhere -inf. In intrinsics, because compilers convert the bytes one by one.
template <class C>
FASTGRU_INLINE vec<C> hide_zeros(vec<C> v, typename PerLane<C>::bytes bytes) {
  const vec<C> bottom = splat<C>(-C(__builtin_inf()));
#if FASTGRU_VECTOR_BYTES > 16
  __m128i wide = {};
  __builtin_memcpy(&wide, &bytes, sizeof bytes);
#endif
#if FASTGRU_VECTOR_BYTES == 64
  const __mmask16 shown = _mm_test_epi8_mask(wide, wide);
  if constexpr (same<C, float>)
    return (vf32)_mm512_mask_mov_ps((__m512)bottom, shown, (__m512)v);
  else
    return (vf64)_mm512_mask_mov_pd((__m512d)bottom, __mmask8(shown), (__m512d)v);
#elif FASTGRU_VECTOR_BYTES == 32
  using ivec = typename Simd<C>::ivec;
  return (same<C, float> ? (ivec)_mm256_cvtepu8_epi32(wide) : (ivec)_mm256_cvtepu8_epi64(wide)) != 0 ? v : bottom;
#else
  return __builtin_convertvector(bytes, typename Simd<C>::ivec) != 0 ? v : bottom;
#endif
}
