// Micro-kernel of attention's products: out = a b for strips of kStrip = 6 rows of `a` and groups of kAcross vectors of
// `b`, with the accumulators in registers. Included after gemm/panel.inl.h and simd/reduce.inl.h.
//
// Unlike the 8 x 3 panels of panel.inl.h the output is an array with a row stride, `a` may be transposed, and b's rows
// may be multiplied where they are in memory. Loop order of multiply(): groups of b, strips of a, chunks of kDepth of
// k.

constexpr int kStrip = 6;  // rows of the micro-kernel
// Vectors of the micro-kernel: 6 x 4 accumulators of 32 registers, 6 x 2 of 16.
constexpr int kAcross = FASTGRU_VECTOR_BYTES == 64 ? 4 : 2;

// The right operand: `depth` rows k, a multiple of kPair, and `vectors` vectors of columns.
// Packed: [groups][depth / kPair][width][W][kPair], groups of `width` = kAcross vectors, the last one narrower.
// In place, where `ld` is set: row-major with row stride `ld`, the number of columns a multiple of W.
template <class E>
struct Right {
  static constexpr int W = lanes<compute_t<E>>;
  const E* data;
  int64_t depth, vectors, ld = 0;

  int64_t groups() const { return ceil_div(vectors, kAcross); }
  int width(int64_t g) const { return int(imin(kAcross, vectors - g * kAcross)); }
  E* group(int64_t g) const { return const_cast<E*>(data) + g * kAcross * W * (ld ? 1 : depth); }
  // Distance from one k (bf16: pair of k) to the next within a group.
  int64_t step(int64_t g) const { return ld ? ld : width(g) * W * kPair<E>; }
};

// The left operand: row i at depth k (bf16: the pair of k) is data[i * row + k / kPair * step].
template <class E>
struct Left {
  const E* data;
  int64_t row, step;
};

// acc += a[i] b: one k (bf16: pair of k) of kStrip rows, at row[i] + at, times V vectors at b.
template <class E, int V>
FASTGRU_INLINE void strip_step(const E* const* row, int64_t at, const E* b, vec<compute_t<E>> (&acc)[kStrip][V]) {
  using C = compute_t<E>;
  vec<C> bv[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) bv[v] = load(reinterpret_cast<const C*>(b + v * lanes<C> * kPair<E>));
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(row[i] + at, bv[v], acc[i][v]);
}

template <class C, int V>
FASTGRU_INLINE void clear(vec<C> (&acc)[kStrip][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = vec<C>{};
}

// out = a b, out += a b, out = decay[row] out + a b.
enum class Into { kStore, kAdd, kDecay };

// One strip, out[kStrip][ld], and V vectors. Sums over k ascending, in chunks of kDepth that are added to `out`.
template <class E, int V, Into into>
static void strip_kernel(int64_t K, Left<E> a, const E* b, int64_t ldb, compute_t<E>* out, int64_t ld,
                         const compute_t<E>* decay) {
  using C = compute_t<E>;
  constexpr int W = lanes<C>, P = kPair<E>;
  const E* row[kStrip];
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) row[i] = a.data + i * a.row;
  for (int64_t begin = 0; begin < K; begin += kDepth) {
    vec<C> acc[kStrip][V];
    clear<C, V>(acc);
    const int64_t end = imin(K, begin + kDepth);
    int64_t at = begin / P * a.step;
    for (int64_t k = begin; k < end; k += P, b += ldb, at += a.step) strip_step<E, V>(row, at, b, acc);
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        C* to = out + i * ld + v * W;
        if (into == Into::kDecay && begin == 0)
          store(to, fma(load(to), splat<C>(decay[i]), acc[i][v]));
        else if (into == Into::kStore && begin == 0)
          store(to, acc[i][v]);
        else
          store(to, load(to) + acc[i][v]);
      }
  }
}

// Rows [0, rows) of a, groups [g0, g1) of b and depth [k0, k1) of both; k0 is a multiple of kPair. `out` begins at
// column 0 of b. Invariant: `a` and `out` reach up to whole strips of rows; rows of `out` from `rows` on are undefined.
template <Into into, class E>
static void multiply(int64_t rows, const Left<E>& a, const Right<E>& b, int64_t g0, int64_t g1, int64_t k0, int64_t k1,
                     compute_t<E>* out, int64_t ld, const compute_t<E>* decay = nullptr) {
  using C = compute_t<E>;
  constexpr int W = lanes<C>;
  using Kernel = void (*)(int64_t, Left<E>, const E*, int64_t, C*, int64_t, const C*);
#if FASTGRU_VECTOR_BYTES == 64
  static constexpr Kernel kernels[] = {strip_kernel<E, 1, into>, strip_kernel<E, 2, into>, strip_kernel<E, 3, into>,
                                       strip_kernel<E, 4, into>};
#else
  static constexpr Kernel kernels[] = {strip_kernel<E, 1, into>, strip_kernel<E, 2, into>};
#endif
  if (k1 <= k0) return;
  for (int64_t g = g0; g < g1; ++g) {
    const int width = b.width(g);
    const int64_t ldb = b.step(g);
    const E* group = b.group(g) + k0 / kPair<E> * ldb;
    for (int64_t i = 0; i < rows; i += kStrip)
      kernels[width - 1](k1 - k0, {a.data + i * a.row + k0 / kPair<E> * a.step, a.row, a.step}, group, ldb,
                         out + i * ld + g * kAcross * W, ld, decay ? decay + i : nullptr);
  }
}

// All columns of b.
template <class E>
static void multiply(Into into, int64_t rows, const Left<E>& a, const Right<E>& b, int64_t k0, int64_t k1,
                     compute_t<E>* out, int64_t ld, const compute_t<E>* decay = nullptr) {
  if (into == Into::kStore)
    multiply<Into::kStore>(rows, a, b, 0, b.groups(), k0, k1, out, ld);
  else if (into == Into::kAdd)
    multiply<Into::kAdd>(rows, a, b, 0, b.groups(), k0, k1, out, ld);
  else
    multiply<Into::kDecay>(rows, a, b, 0, b.groups(), k0, k1, out, ld, decay);
}
