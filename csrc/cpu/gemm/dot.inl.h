// Products by dot products along the rows of a matrix as it lies in memory: too few rows to pay for packing.

// Dot products of MR rows of A with W / MR rows of a row-major matrix, units[0 ..]: out[row * out_row + unit].
// The lanes of each product run over k = lane mod W and are summed as a tree of neighbours, for all W products at once.
template <class C, class S, int MR>
static void dot_kernel(int64_t K, const C* const* a, const S* const* units, C* out, int64_t out_row) {
  constexpr int W = lanes<C>, U = W / MR;
  vec<C> acc[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) acc[i] = vec<C>{};
  const auto advance = [&](int64_t k, auto&& load_a, auto&& load_w) __attribute__((always_inline)) {
    vec<C> av[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) av[i] = load_a(a[i] + k);
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      const vec<C> wv = load_w(units[u] + k);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i * U + u] = fma(av[i], wv, acc[i * U + u]);
    }
  };
  int64_t k = 0;
  for (; k + W <= K; k += W) advance(k, [](const C* p) { return load(p); }, [](const S* p) { return load(p); });
  if (k < K) {
    const int left = int(K - k);
    advance(k, [&](const C* p) { return load_n(p, left); }, [&](const S* p) { return load_n(p, left); });
  }
  sum_neighbours<C, 1>(acc);
  if constexpr (MR == 1) {
    store(out, acc[0]);
  } else {
    for (int i = 0; i < MR; ++i)
      for (int u = 0; u < U; ++u) out[i * out_row + u] = acc[0][i * U + u];
  }
}

// All gates of the units of block j for rows a[0 .. count): out[row][gate][W], zero for units that do not exist.
template <class C, class S>
static void dot_block(int64_t K, int64_t H, const S* w, int64_t j, const C* const* a, int count, C* out) {
  constexpr int W = lanes<C>;
  const int exist = int(imin(W, H - j * W));
  for (int g = 0; g < 3; ++g) {
    const S* unit[W];
    for (int u = 0; u < W; ++u) unit[u] = w + (g * H + j * W + (u < exist ? u : 0)) * K;
    for (int i = 0; i < count;) {
      const int rows = count - i >= 4 ? 4 : count - i >= 2 ? 2 : 1;
      const auto kernel = rows == 4 ? dot_kernel < C, S,
                 W < 4 ? W : 4 >
          : rows == 2 ? dot_kernel<C, S, 2>
                      : dot_kernel<C, S, 1>;
      const int step = rows == 4 && W < 4 ? W : rows, covered = W / step;
      for (int u = 0; u < W; u += covered) kernel(K, a + i, unit + u, out + (i * 3 + g) * W + u, 3 * W);
      i += step;
    }
    for (int i = 0; i < count; ++i)
      for (int u = exist; u < W; ++u) out[(i * 3 + g) * W + u] = C(0);
  }
}
