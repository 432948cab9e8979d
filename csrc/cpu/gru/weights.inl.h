// The weights of a layer, packed for the forward pass, and the product of its inputs.

// Depth of a chain. Torch adds products of few columns in short chains, one per lane; chains here are no longer.
static int64_t chain_depth(const GruShape& s) { return s.H <= kFewUnits ? 16 : kDepth; }

// The weights of a layer in the layout of the forward pass's products.
template <class S>
struct LayerWeights {
  using C = compute_t<S>;
  using E = operand_t<S>;
  static constexpr int W = lanes<C>;

  const GruShape& s;
  int64_t blocks;
  bool pack_on_use;            // the input product is computed in one go: each of its panels is packed just before
  Panels<E> w_ih[2], w_hh[2];  // one panel per block: [block][k][r z n][W]
  E* panel_buffer;             // pack_on_use: [workers][panels at a time]
  int64_t panel_buffer_size;
  C* biases[2];  // [blocks][r z n q][W]

  LayerWeights(const GruShape& shape, int64_t blocks_, bool pack_on_use_, int workers, const Scratch& scratch)
      : s(shape),
        blocks(blocks_),
        pack_on_use(pack_on_use_),
        panel_buffer_size(panels_size<E>(s.I, 3 * kMostPanels * W)) {
    panel_buffer = pack_on_use ? take<E>(scratch, workers * panel_buffer_size) : nullptr;
    for (int d = 0; d < s.D; ++d) {
      E* all = pack_on_use ? nullptr : take<E>(scratch, panels_size<E>(s.I, 3 * blocks * W));
      w_ih[d] = {all, padded_depth<E>(s.I), 3 * blocks};
      w_hh[d] = {take<E>(scratch, panels_size<E>(s.H, 3 * blocks * W)), padded_depth<E>(s.H), 3 * blocks};
      biases[d] = take<C>(scratch, 4 * blocks * W);
    }
  }

  // Block j of a matrix [3H, K].
  void pack_block(const void* w, int64_t K, int64_t j, const E* to) const {
    for (int g = 0; g < 3; ++g)
      pack_transposed(static_cast<const S*>(w) + (g * s.H + j * W) * K, K, int(imin(W, s.H - j * W)), K,
                      const_cast<E*>(to) + g * W * kPair<E>, 3 * W * kPair<E>);
  }

  void pack(int d, int64_t j) const {
    if (!pack_on_use) pack_block(s.w[d].w_ih, s.I, j, w_ih[d].panel(j));
    pack_block(s.w[d].w_hh, s.H, j, w_hh[d].panel(j));
    load_biases<C, S>(s.w[d], s.H, j, biases[d] + j * 4 * W);
  }

  // Input part of the gates of blocks [j0, j1), biases and all, of `tokens` rows: put(row, block) is where its r z n
  // go.
  template <class Rows, class Put>
  FASTGRU_METHOD void project(int worker, int d, int64_t tokens, Rows&& rows, int64_t j0, int64_t j1, Put&& put) const {
    Panels<E> panels = w_ih[d];
    panels.depth = chain_depth(s);
    int64_t first = 0, step = j1 - j0;
    if (pack_on_use) panels.data = panel_buffer + worker * panel_buffer_size, step = kMostPanels;
    for (; j0 < j1; j0 += step) {
      const int64_t end = imin(j1, j0 + step);
      if (pack_on_use) {
        first = j0;
        panels.vectors = 3 * (end - j0);
        for (int64_t j = j0; j < end; ++j) pack_block(s.w[d].w_ih, s.I, j, panels.panel(j - first));
      }
      panel_product<E>(
          tokens, [&](int, int64_t i) { return rows(i); }, 1, &panels, j0 - first, end - first,
          [&](int64_t i0, int count, int64_t p, int, const C* tile) {
            for (int i = 0; i < count; ++i) {
              C* to = put(i0 + i, first + p);
              for (int g = 0; g < 3; ++g)
                store(to + g * W, load(tile + (i * 3 + g) * W) + load(biases[d] + ((first + p) * 4 + g) * W));
            }
          });
    }
  }
};
