// The GRU of few hidden units and many rows: the lanes of a vector are rows of the batch. The other kernels take W
// units to a vector and would leave most lanes empty here.
//
// Nothing but the weight gradients is summed over rows, so a worker runs some blocks of W rows through all steps by
// itself, with no scratch memory that grows with the sequence or the batch. Outputs, dx and dh0 are the bits of the
// other kernels, operation by operation, because a row must not depend on how many others there are. A weight gradient
// is summed per lane over the blocks of an item, then over the lanes, then over the items; items are cut by the batch
// alone.
//
// Saved gates: for each direction and step [r z n q][H][rows of the step], so that lanes lie side by side.

constexpr int64_t kFewInputs = 128;
constexpr int64_t kTileBlocks = 8;  // blocks that take a step one after the other: their chains of arithmetic overlap
constexpr int64_t kMostItems = 64;

// Depends on sizes alone: a backward pass of any instruction set then knows the layout of the saved gates.
FASTGRU_INLINE bool few_units(const GruShape& s) {
  return s.H >= 1 && s.H <= kFewUnits && s.I <= kFewInputs && s.B >= 2 * s.H;
}

// out[c][row] = row l at from + l * stride, columns [0, n); zero for rows from `rows` on.
template <class S, class C>
static void load_columns(const S* from, int64_t stride, int rows, int64_t n, C* out) {
  constexpr int W = lanes<C>;
  if (n == 1 && stride == 1) return store(out, load_upto(from, rows));
  for (int64_t c = 0; c < n; c += W) {
    const int columns = int(imin(W, n - c));
    vec<C> block[W];
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) block[l] = l < rows ? load_upto(from + l * stride + c, columns) : vec<C>{};
    transpose_block<C>(block);
    for (int i = 0; i < columns; ++i) store(out + (c + i) * W, block[i]);
  }
}

// The inverse of load_columns.
template <class S, class C>
static void store_columns(S* to, int64_t stride, int rows, int64_t n, const C* in) {
  constexpr int W = lanes<C>;
  if (n == 1 && stride == 1) return store_upto(to, load(in), rows);
  for (int64_t c = 0; c < n; c += W) {
    const int columns = int(imin(W, n - c));
    vec<C> block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) block[i] = i < columns ? load(in + (c + i) * W) : vec<C>{};
    transpose_block<C>(block);
    for (int l = 0; l < rows; ++l) store_upto(to + l * stride + c, block[l], columns);
  }
}

// The state common to both passes.
template <class S>
struct FewUnits {
  using C = compute_t<S>;
  static constexpr int W = lanes<C>;

  const GruShape& s;
  Steps steps;
  int64_t blocks, tile_blocks, tiles, items;
  int workers;
  bool tree;  // a single step, which single_step.inl.h adds up in another order
  // Weights in the compute type. Transposed, [k][unit][r z n], and as they are, [r z n][unit][k].
  C *across_ih[2], *across_hh[2], *w_ih[2], *w_hh[2];
  C* biases[2];  // [unit][r z n q]

  // `flops` per row and step besides what the gates cost, which is as much as some multiply-adds.
  FewUnits(const GruShape& shape, const Parallel& parallel, const Scratch& scratch, double flops)
      : s(shape),
        steps(s, take<int64_t>(scratch, s.T + 1)),
        blocks(ceil_div(s.B, W)),
        tile_blocks(imax(1, imin(kTileBlocks, blocks / 16))),
        tiles(ceil_div(blocks, tile_blocks)),
        items(imin(tiles, kMostItems)),
        workers(worth_workers(parallel, double(s.D * s.N) * (flops + 100.0 * double(s.H)), 0)),
        tree(s.T == 1 && !s.batch_sizes) {}

  void take_across(const Scratch& scratch) {
    for (int d = 0; d < s.D; ++d) {
      across_ih[d] = across(scratch, s.w[d].w_ih, s.I);
      across_hh[d] = across(scratch, s.w[d].w_hh, s.H);
      biases[d] = take<C>(scratch, 4 * s.H);
      const S *ih = static_cast<const S*>(s.w[d].b_ih), *hh = static_cast<const S*>(s.w[d].b_hh);
      for (int64_t u = 0; u < s.H; ++u)
        for (int g = 0; g < 3; ++g) {
          const C b_ih = ih ? load_one(ih + g * s.H + u) : C(0), b_hh = hh ? load_one(hh + g * s.H + u) : C(0);
          biases[d][u * 4 + g] = g < 2 ? b_ih + b_hh : b_ih;
          if (g == 2) biases[d][u * 4 + 3] = b_hh;
        }
    }
  }
  C* across(const Scratch& scratch, const void* w, int64_t K) const {
    C* to = take<C>(scratch, 3 * s.H * K);
    for (int64_t g = 0; g < 3; ++g)
      for (int64_t u = 0; u < s.H; ++u)
        for (int64_t k = 0; k < K; ++k)
          to[(k * s.H + u) * 3 + g] = load_one(static_cast<const S*>(w) + (g * s.H + u) * K + k);
    return to;
  }

  void take_along(const Scratch& scratch) {
    for (int d = 0; d < s.D; ++d) {
      w_ih[d] = along(scratch, s.w[d].w_ih, s.I);
      w_hh[d] = along(scratch, s.w[d].w_hh, s.H);
    }
  }
  C* along(const Scratch& scratch, const void* w, int64_t K) const {
    C* to = take<C>(scratch, 3 * s.H * K);
    copy_operand(static_cast<const S*>(w), 3 * s.H * K, to, 3 * s.H * K);
    return to;
  }

  // Rows of a block that take part where `rows` of the batch do.
  int live(int64_t block, int64_t rows) const { return int(imax(0, imin(W, rows - block * W))); }

  // The first gate of unit 0 of a block; the next unit, and the next gate after H units, are `rows` further.
  template <class T>
  T* saved(T* gates, int d, int64_t step, int64_t block) const {
    return gates + (d * s.N + steps.token(d, step)) * 4 * s.H + block * W;
  }

  void load_input(int d, int64_t step, int64_t block, int rows, C* x) const {
    const int64_t b = block * W;
    load_columns(input_row<S>(s, steps.time(d, step), b, steps.token(d, step) + b), s.x_stride_b, rows, s.I, x);
  }

  // The gates of a block: put(unit, gates). gi and gh: [unit][3][W] to work in.
  template <class Put>
  FASTGRU_METHOD void gates(int d, const C* x, const C* h, bool as_tree, C* gi, C* gh, Put&& put) const {
    lane_product(s.I, x, across_ih[d], 3 * s.H, gi, chain_depth(s), as_tree);
    lane_product(s.H, h, across_hh[d], 3 * s.H, gh, kDepth, as_tree);
    for (int64_t u = 0; u < s.H; ++u) {
      const C* bias = biases[d] + u * 4;
      for (int g = 0; g < 3; ++g) {
        C* to = gi + (u * 3 + g) * W;
        store(to, load(to) + splat<C>(bias[g]));
      }
      reset_and_update<C>(gi + u * 3 * W, gh + u * 3 * W);
    }
    for (int64_t u = 0; u < s.H; ++u)
      put(u, gru_gates<C>(gi + u * 3 * W, gh + u * 3 * W, splat<C>(biases[d][u * 4 + 3]), load(h + u * W)));
  }

  // Calls tile(first, end) for the blocks of each tile of an item.
  template <class Tile>
  void each_tile(int64_t item, Tile&& tile) const {
    for (int64_t i = tiles * item / items; i < tiles * (item + 1) / items; ++i)
      tile(i * tile_blocks, imin(blocks, (i + 1) * tile_blocks));
  }
};

template <class S>
struct FewUnitsForward : FewUnits<S> {
  using Base = FewUnits<S>;
  using Base::s;
  using Base::steps;
  using typename Base::C;
  static constexpr int W = lanes<C>;

  const GruForward& f;

  FewUnitsForward(const GruForward& forward, const Parallel& parallel, const Scratch& scratch)
      : Base(forward.s, parallel, scratch, 6.0 * double(forward.s.H * (forward.s.H + forward.s.I))), f(forward) {
    this->take_across(scratch);
  }

  void tile(int d, int64_t first, int64_t end) const {
    alignas(64) C h[kTileBlocks * kFewUnits * W], x[kFewInputs * W], gi[kFewUnits * 3 * W], gh[kFewUnits * 3 * W];
    const auto state = [&](int64_t block) { return h + (block - first) * s.H * W; };
    for (int64_t block = first; block < end; ++block)
      load_columns(static_cast<const S*>(s.h0) + (d * s.B + block * W) * s.H, s.H, this->live(block, s.B), s.H,
                   state(block));
    for (int64_t step = 0; step < s.T; ++step) {
      const int64_t rows = steps.rows(d, step), token = steps.token(d, step);
      for (int64_t block = first; block < end; ++block) {
        const int live = this->live(block, rows);
        if (!live) break;
        C* own = state(block);
        S* saved = f.gates ? this->saved(static_cast<S*>(f.gates), d, step, block) : nullptr;
        this->load_input(d, step, block, live, x);
        this->gates(d, x, own, this->tree, gi, gh, [&](int64_t u, const Gates<C>& g) {
          // A row that has ended, or has not begun, keeps its state.
          store(own + u * W, live < W ? first_lanes<C>(live, g.h, load(own + u * W)) : g.h);
          if (!saved) return;
          store_upto(saved + u * rows, g.r, live);
          store_upto(saved + (s.H + u) * rows, g.z, live);
          store_upto(saved + (2 * s.H + u) * rows, g.n, live);
          store_upto(saved + (3 * s.H + u) * rows, g.q, live);
        });
        store_columns(static_cast<S*>(f.y) + (token + block * W) * s.D * s.H + d * s.H, s.D * s.H, live, s.H, own);
      }
    }
    for (int64_t block = first; block < end; ++block)
      store_columns(static_cast<S*>(f.h_n) + (d * s.B + block * W) * s.H, s.H, this->live(block, s.B), s.H,
                    state(block));
  }

  void run(Worker& worker) const {
    worker.phase(s.D * this->items, false, [&](int64_t item) {
      const int d = int(item / this->items);
      this->each_tile(item % this->items, [&](int64_t first, int64_t end) { tile(d, first, end); });
    });
  }
};

template <class S>
static void few_units_forward(const GruForward& f, const Parallel& parallel, const Scratch& scratch) {
  const FewUnitsForward<S> forward(f, parallel, scratch);
  run_region(parallel, forward.workers, [&](Worker& worker) { forward.run(worker); });
}
