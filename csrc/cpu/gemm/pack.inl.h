// Packing: operands of a product copied into the order in which its kernels read them.

// One vector of `columns` columns taken from rows of a row-major matrix: out[k * stride + lane] = src[lane][k].
// src: the first row, rows `ld` apart; `columns` <= W of them exist, the rest is zero.
template <class C, class S>
static void pack_transposed(const S* src, int64_t ld, int columns, int64_t K, C* out, int64_t stride) {
  constexpr int W = lanes<C>;
  for (int64_t k = 0; k < K; k += W) {
    const int depth = K - k < W ? int(K - k) : W;
    vec<C> block[W];
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) block[l] = l < columns ? load_upto(src + l * ld + k, depth) : vec<C>{};
    transpose_block<C>(block);
    for (int l = 0; l < depth; ++l) store(out + (k + l) * stride, block[l]);
  }
}

// One panel of `width` vectors from rows given by address: out[k][v][lane] = row(k)[lane + v * W], zero beyond
// `columns` and where row(k) is null.
template <class C, class Row>
FASTGRU_INLINE void pack_rows(Row&& row, int64_t K, int64_t columns, int width, C* out) {
  constexpr int W = lanes<C>;
  for (int64_t k = 0; k < K; ++k, out += width * W) {
    const auto* src = row(k);
    for (int v = 0; v < width; ++v) {
      const int64_t left = columns - v * W;
      store(out + v * W, src && left > 0 ? load_upto(src + v * W, int(left < W ? left : W)) : vec<C>{});
    }
  }
}

#if defined(FASTGRU_NATIVE_BF16)
// The same two for bf16 operands: a pair of neighbouring k is one 32-bit word, which moves as a float does.
static void pack_transposed(const bf16* src, int64_t ld, int columns, int64_t K, bf16* out, int64_t stride) {
  constexpr int W = lanes<float>;
  float* words = reinterpret_cast<float*>(out);
  for (int64_t k = 0; k < K; k += 2 * W) {
    const int depth = K - k < 2 * W ? int(K - k) : 2 * W;
    vf32 block[W];
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) block[l] = l < columns ? load_pairs(src + l * ld + k, depth) : vf32{};
    transpose_block<float>(block);
    for (int l = 0; l < (depth + 1) / 2; ++l) store(words + (k / 2 + l) * (stride / 2), block[l]);
  }
}

template <class E, class Row>
FASTGRU_INLINE void pack_rows(Row&& row, int64_t K, int64_t columns, int width, bf16* out) {
  constexpr int W = lanes<float>;
  const auto bits = [&](int64_t k, int v) __attribute__((always_inline)) {
    const bf16* src = k < K ? row(k) : nullptr;
    const int64_t left = columns - v * W;
    vu16half half = {};
    if (src && left > 0) half = load_bits(src + v * W, int(left < W ? left : W));
    return __builtin_convertvector(half, vu32);
  };
  float* words = reinterpret_cast<float*>(out);
  for (int64_t k = 0; k < K; k += 2, words += width * W)
    for (int v = 0; v < width; ++v) store(words + v * W, (vf32)(bits(k, v) | bits(k + 1, v) << 16));
}
#endif

// One row as an operand: `n` elements converted, zeros up to `depth`.
template <class E, class S>
static void copy_operand(const S* from, int64_t n, E* to, int64_t depth) {
  constexpr int W = lanes<compute_t<S>>;
  for (int64_t k = 0; k < depth; k += W) {
    const int left = int(imin(W, n - k));
    store_upto(to + k, left > 0 ? load_upto(from + k, left) : vec<compute_t<S>>{}, int(imin(W, depth - k)));
  }
}
