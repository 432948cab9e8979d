// Products whose vector lanes are rows: every lane adds in the order of tile.inl.h or dot.inl.h for its row.

// out[n][lane] = sum over k of a[k][lane] * w[k * ldw + n], in the order of tile_kernel.
template <class C, int N>
static void lane_chains(int64_t K, int64_t depth, const C* a, const C* w, int64_t ldw, C* out) {
  constexpr int W = lanes<C>;
  for (int64_t begin = 0; begin < imax(K, 1); begin += depth) {
    const int64_t end = imin(K, begin + depth);
    vec<C> acc[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[n] = vec<C>{};
    for (int64_t k = begin; k < end; ++k) {
      const vec<C> av = load(a + k * W);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[n] = fma(splat<C>(w[k * ldw + n]), av, acc[n]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + n * W, begin ? load(out + n * W) + acc[n] : acc[n]);
  }
}

// The same sum in the order of dot_kernel: a chain for every k modulo W, the chains added as a tree of neighbours. This
// is the branch of `Leaves` chains from chain `first` on.
template <class C, int N, int Leaves = lanes<C>>
static void lane_tree(int64_t K, const C* a, const C* w, int64_t ldw, C* out, int64_t first = 0) {
  constexpr int W = lanes<C>;
  if constexpr (Leaves > 1) {
    lane_tree<C, N, Leaves / 2>(K, a, w, ldw, out, first);
    if (first + Leaves / 2 >= K) return;
    alignas(64) C other[N * W];
    lane_tree<C, N, Leaves / 2>(K, a, w, ldw, other, first + Leaves / 2);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + n * W, load(out + n * W) + load(other + n * W));
  } else {
    vec<C> acc[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[n] = vec<C>{};
    for (int64_t k = first; k < K; k += W) {
      const vec<C> av = load(a + k * W);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[n] = fma(splat<C>(w[k * ldw + n]), av, acc[n]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + n * W, acc[n]);
  }
}

template <class C>
struct LaneTable {
  using Kernel = void (*)(int64_t, int64_t, const C*, const C*, int64_t, C*);
  template <int N>
  static void tree(int64_t K, int64_t, const C* a, const C* w, int64_t ldw, C* out) {
    lane_tree<C, N>(K, a, w, ldw, out);
  }
  static constexpr int kMost = 8;
  static constexpr Kernel kernels[2][kMost] = {
      {lane_chains<C, 1>, lane_chains<C, 2>, lane_chains<C, 3>, lane_chains<C, 4>, lane_chains<C, 5>, lane_chains<C, 6>,
       lane_chains<C, 7>, lane_chains<C, 8>},
      {tree<1>, tree<2>, tree<3>, tree<4>, tree<5>, tree<6>, tree<7>, tree<8>}};
};

// All `columns` columns of w [K, columns].
template <class C>
static void lane_product(int64_t K, const C* a, const C* w, int64_t columns, C* out, int64_t depth = kDepth,
                         bool tree = false) {
  using Table = LaneTable<C>;
  for (int64_t n = 0; n < columns; n += Table::kMost)
    Table::kernels[tree][imin(Table::kMost, columns - n) - 1](K, depth, a, w + n, columns, out + n * lanes<C>);
}

// acc[m * columns + n][lane] += sum over blocks of a[block][m][lane] * b[block][n][lane].
template <class C, int M, int N>
static void lane_outer(int blocks, const C* a, int64_t block_a, const C* b, int64_t block_b, C* acc, int64_t columns) {
  constexpr int W = lanes<C>;
  vec<C> sum[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = vec<C>{};
  for (int i = 0; i < blocks; ++i, a += block_a, b += block_b) {
    vec<C> bv[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) bv[n] = load(b + n * W);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vec<C> av = load(a + m * W);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = fma(av, bv[n], sum[m][n]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      C* to = acc + (m * columns + n) * W;
      store(to, load(to) + sum[m][n]);
    }
}

template <class C>
struct OuterTable {
  using Kernel = void (*)(int, const C*, int64_t, const C*, int64_t, C*, int64_t);
  static constexpr int M = 3, N = 4;
  static constexpr Kernel kernels[N] = {lane_outer<C, M, 1>, lane_outer<C, M, 2>, lane_outer<C, M, 3>,
                                        lane_outer<C, M, 4>};
};
