// Register-tiled matrix products on packed panels: the layout, the blocking and the micro-kernel.
//
// The right-hand matrix B [K, columns] is cut into panels of up to kPanel vectors of columns; within a panel, the row
// of each k is contiguous: panel[k][v][lane]. (bf16 operands: of each pair of k, panel[k / 2][v][lane][2].) A tile is
// up to kRows rows of A times one or more panels, held in registers. Every output is a chain of multiply-adds over
// ascending k, a new chain every `depth` (which keeps the rounding error from growing with K), the chains added up in
// order. So its value depends on its row, its column and K alone: never on tile shapes, neighbours in the batch or
// threads.

constexpr int kPanel = 3;                    // vectors per panel: the three gates of W hidden units, or 3 W columns
constexpr int kRows = kVectorRegisters / 4;  // 8 x 3 accumulators of 32 registers, 4 x 3 of 16
constexpr int kTile = kRows * kPanel;
// Without fused multiply-adds every product is rounded too: shorter chains then.
constexpr int64_t kDepth = kFusedMultiplyAdd ? 256 : 64;

// How many panels a tile of `rows` rows covers, so that enough independent accumulators hide the latency of fma.
constexpr int kMostPanels = 4;
constexpr int panels_at_once(int rows) {
  return rows * kPanel * 4 <= kTile ? kMostPanels : rows * kPanel * 2 <= kTile ? 2 : 1;
}

template <class E>
constexpr int64_t padded_depth(int64_t K) {
  return (K + kPair<E> - 1) / kPair<E> * kPair<E>;
}

// Columns packed into panels of elements E; the last panel may be narrower than kPanel vectors. Or, with `ld` set, a
// row-major matrix as it lies in memory, rows `ld` apart, its columns a multiple of W: for a product too small to pay
// for packing.
template <class E>
struct Panels {
  const E* data;
  int64_t K;        // a multiple of kPair
  int64_t vectors;  // ceil(columns / W)
  int64_t ld = 0;
  int64_t depth = kDepth;  // of a chain

  int64_t count() const { return (vectors + kPanel - 1) / kPanel; }
  int width(int64_t p) const { return int(vectors - p * kPanel < kPanel ? vectors - p * kPanel : kPanel); }
  int64_t stride() const { return kPanel * lanes<compute_t<E>> * (ld ? 1 : K); }             // from panel to panel
  int64_t row(int width) const { return ld ? ld : width * lanes<compute_t<E>> * kPair<E>; }  // from k to the next
  const E* panel(int64_t p) const { return data + p * stride(); }
};

template <class E>
constexpr int64_t panels_size(int64_t K, int64_t columns) {
  constexpr int W = lanes<compute_t<E>>;
  return (columns + W - 1) / W * W * padded_depth<E>(K);
}

// out[p][row][v][lane] = (what it was, if `accumulate`) + sum over k of a[row][k] * b[p][k][v][lane].
// `ldb`: elements from one k (bf16: pair of k) of a panel to the next. By rows: `a` holds one pointer per row, `lda` is
// not used. Transposed: a[0] points at the MR values of the first k (bf16: [MR][2] of the first pair), the next are
// `lda` further.
template <class E, int MR, int NP, int V, bool Transposed>
static void tile_kernel(int64_t K, const E* const* a, int64_t lda, const E* b, int64_t ldb, int64_t panel_stride,
                        compute_t<E>* out, bool accumulate) {
  using C = compute_t<E>;
  constexpr int W = lanes<C>, P = kPair<E>;
  vec<C> acc[NP][MR][V];
#pragma GCC unroll 4
  for (int p = 0; p < NP; ++p)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[p][i][v] = vec<C>{};
  const E* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) row[i] = a[Transposed ? 0 : i];
  for (int64_t k = 0; k < K; k += P) {
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      vec<C> bv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) bv[v] = load(reinterpret_cast<const C*>(b + p * panel_stride + v * W * P));
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const E* av = Transposed ? row[0] + i * P : row[i] + k;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[p][i][v] = multiply_add(av, bv[v], acc[p][i][v]);
      }
    }
    b += ldb;
    if (Transposed) row[0] += lda;
  }
#pragma GCC unroll 4
  for (int p = 0; p < NP; ++p)
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        C* to = out + ((p * MR + i) * V + v) * W;
        store(to, accumulate ? load(to) + acc[p][i][v] : acc[p][i][v]);
      }
}

template <class E>
using TileKernel = void (*)(int64_t, const E* const*, int64_t, const E*, int64_t, int64_t, compute_t<E>*, bool);

// By rows - 1; `wide` covers panels_at_once(rows) full panels, `narrow` one panel of v + 1 vectors.
template <class E, bool Transposed, int... I>
struct TileTableOf {
  static constexpr TileKernel<E> wide[] = {tile_kernel<E, I + 1, panels_at_once(I + 1), kPanel, Transposed>...};
  static constexpr TileKernel<E> narrow[kPanel][sizeof...(I)] = {{tile_kernel<E, I + 1, 1, 1, Transposed>...},
                                                                 {tile_kernel<E, I + 1, 1, 2, Transposed>...},
                                                                 {tile_kernel<E, I + 1, 1, 3, Transposed>...}};
};
template <class E, bool Transposed, int Rows>
struct TileTableBy;
template <class E, bool Transposed>
struct TileTableBy<E, Transposed, 4> : TileTableOf<E, Transposed, 0, 1, 2, 3> {};
template <class E, bool Transposed>
struct TileTableBy<E, Transposed, 8> : TileTableOf<E, Transposed, 0, 1, 2, 3, 4, 5, 6, 7> {};
template <class E, bool Transposed>
using TileTable = TileTableBy<E, Transposed, kRows>;

// Largest output of one kernel call, in elements.
template <class C>
constexpr int kTileElements = kTile * 2 * lanes<C>;
