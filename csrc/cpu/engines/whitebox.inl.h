// Parts of kernels as functions of plain arrays, for tests/whitebox.

template <class C, class F>
FASTGRU_INLINE void map(int64_t n, const C* x, C* y, F&& f) {
  constexpr int W = lanes<C>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, f(load(x + i)));
  if (i < n) store_n(y + i, f(load_n(x + i, int(n - i))), int(n - i));
}

template <class C>
static void exp_all(int64_t n, const C* x, C* y) {
  map(n, x, y, [](vec<C> v) { return exp<C>(v); });
}
template <class C>
static void sigmoid_all(int64_t n, const C* x, C* y) {
  map(n, x, y, [](vec<C> v) { return sigmoid<C>(v); });
}
template <class C>
static void tanh_all(int64_t n, const C* x, C* y) {
  map(n, x, y, [](vec<C> v) { return tanh<C>(v); });
}
template <class S>
static void to_f32(int64_t n, const void* x, float* y) {
  const S* from = static_cast<const S*>(x);
  for (int64_t i = 0; i < n; ++i) y[i] = load_one(from + i);
}
template <class S>
static void from_f32(int64_t n, const float* x, void* y) {
  S* to = static_cast<S*>(y);
  for (int64_t i = 0; i < n; ++i) store_one(to + i, x[i]);
}

// Panels of b, then one product; `a` is read by rows, or packed by tiles of columns when it comes transposed.
template <bool TransposedA>
static void gemm_f32(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c) {
  constexpr int W = lanes<float>;
  const int64_t vectors = ceil_div(N, W);
  float* memory =
      static_cast<float*>(__builtin_malloc(size_t(panels_size<float>(K, N) + kRows * K + 1) * sizeof(float)));
  if (!memory) __builtin_abort();
  const Panels<float> panels{memory, K, vectors};
  float* packed_a = memory + panels_size<float>(K, N);
  for (int64_t p = 0; p < panels.count(); ++p)
    pack_rows<float>([&](int64_t k) { return b + k * N + p * kPanel * W; }, K, N - p * kPanel * W, panels.width(p),
                     const_cast<float*>(panels.panel(p)));
  const auto put = [&](int64_t i0, int count, int64_t p, int width, const float* tile) {
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < width; ++v) {
        const int64_t column = (p * kPanel + v) * W;
        store_upto(c + (i0 + i) * N + column, load(tile + (i * width + v) * W), int(imin(W, N - column)));
      }
  };
  if (!TransposedA) {
    panel_product<float>(M, [&](int, int64_t i) { return a + i * K; }, 1, &panels, 0, panels.count(), put);
  } else {
    for (int64_t m = 0; m < M; m += kRows) {
      const int count = int(imin(kRows, M - m));
      for (int64_t k = 0; k < K; ++k)
        for (int i = 0; i < count; ++i) packed_a[k * count + i] = a[k * M + m + i];
      for (int64_t p = 0; p < panels.count(); ++p) {
        alignas(64) float tile[kTileElements<float>];
        for (int64_t k = 0; k < K; k += kDepth) {
          const float* rows = packed_a + k * count;
          TileTable<float, true>::narrow[panels.width(p) - 1][count - 1](imin(K - k, kDepth), &rows, count,
                                                                         panels.panel(p) + k * panels.width(p) * W,
                                                                         panels.width(p) * W, 0, tile, k > 0);
        }
        put(m, count, p, panels.width(p), tile);
      }
    }
  }
  __builtin_free(memory);
}

static const WhiteboxKernels whitebox_kernels = {
    exp_all<float>,
    exp_all<double>,
    sigmoid_all<float>,
    sigmoid_all<double>,
    tanh_all<float>,
    tanh_all<double>,
    {to_f32<float>, nullptr, to_f32<bf16>, to_f32<f16>},
    {from_f32<float>, nullptr, from_f32<bf16>, from_f32<f16>},
    gemm_f32<false>,
    gemm_f32<true>,
};
