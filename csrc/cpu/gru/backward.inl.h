// The backward pass: plan, recurrence and the order of its phases.

constexpr int64_t kFewTokens = 4;    // weight gradients of no more than these are not worth a packing
constexpr int64_t kBiasDepth = 32;   // tokens summed in one chain before they are added to a bias gradient
constexpr int64_t kGroup = 4;        // panels of a product's result per item
constexpr int64_t kTokenGroup = 64;  // tokens of dx per item
constexpr int64_t kUnitGroup = 64;   // hidden units per item where tokens are paired
constexpr int64_t kChunkBytes = int64_t(1) << 20;  // of gate gradients: read again while near

template <class S>
struct Backward {
  using C = compute_t<S>;
  using E = operand_t<S>;
  static constexpr int W = lanes<C>;
  // Gate gradients of a token: [n | r | z | q], each `units` wide, so that the three that meet W_ih (n, r, z) lie side
  // by side and so do the three that meet W_hh (r, z, q).
  enum Plane { kN = 0, kR = 1, kZ = 2, kQ = 3 };
  static constexpr int kGateOfPlane[4] = {2, 0, 1, 2};

  const GruBackward& f;
  const GruShape& s;
  int64_t blocks, units, saved_row, plane;
  int64_t gate_row;  // an odd number of cache lines: the same unit of many tokens then lies in many sets of a cache
  Sharing sharing;
  Steps steps;
  // Rows in the order of the planes; columns H and I. W_ih in two parts per direction, [n] and [r z], because its rows
  // come in another order where it is used as it lies in memory.
  Panels<E> w_hh[2], w_ih[4];
  bool weights_in_place;  // both are used as they lie in memory
  const S** input;        // [N] input rows
  const S** previous[2];  // [N] rows of the state before the token's step
  C* dh_carry[2];         // [B][units] dh * z of the step before

  // The sequence is cut into chunks of steps, processed from the last to the first. Memory of a chunk:
  int64_t chunk_steps;
  E* dgates[2];                      // [tokens][gate_row]: n r z q, each [units]
  E* later[2];                       // those of the first step after the chunk, [B][gate_row]
  E* left[2];                        // pairs of tokens only: [plane][tile of kRows units][token / 2][unit][2]
  Panels<E> right_x[2], right_h[2];  // input rows and states before the step, as panels over the tokens
  C *dw_ih[2], *dw_hh[2];            // sums over the chunks, where they cannot live in the result
  C* db[2];                          // [plane][units] likewise
  // Only where the forward pass did not save the gates: operands to compute them again.
  const LayerWeights<S>* weights;
  C* gates[2];               // [tokens][blocks][r z n q][W]
  E *inputs[2], *states[2];  // [tokens][depth] operands, where the rows themselves will not do

  Backward(const GruBackward& backward, const Parallel& parallel, const Scratch& scratch)
      : f(backward),
        s(backward.s),
        blocks(ceil_div(s.H, W)),
        units(blocks * W),
        saved_row(4 * saved_units(s.H)),
        plane(saved_plane(s.H)),
        gate_row((4 * units * int64_t(sizeof(E)) / 64 | 1) * 64 / int64_t(sizeof(E))),
        sharing(
            parallel, s,
            6.0 * s.D * s.N * s.H * (s.H + (f.dx ? s.I : 0) + (f.dw_ih ? s.I + s.H : 0) + (f.gates ? 0 : s.I + s.H)),
            3 * s.H * s.H * int64_t(sizeof(E)), 3 * s.D * s.H * (s.H + s.I) * int64_t(sizeof(E))),
        steps(s, take<int64_t>(scratch, s.T + 1)),
        weights_in_place(same<S, E> && kPair<E> == 1 && s.T == 1 && s.B <= kRows && s.H % W == 0 && s.I % W == 0),
        weights(nullptr) {
    const int64_t near = imax(kDepth, kChunkBytes / (4 * units * int64_t(sizeof(E))));
    const int64_t target = f.chunk_tokens ? f.chunk_tokens : near;
    // Both directions add to dx, each at its own time: with a type narrower than the sum's, at once or not at all.
    const bool whole = s.D == 2 && f.dx && !same<S, C>;
    chunk_steps = whole ? s.T : imin(s.T, imax(1, target / s.B));
    const int64_t tokens = imin(s.N, chunk_steps * s.B), depth = padded_depth<E>(tokens);
    const int64_t columns = ceil_div(s.I, W);
    input = take<const S*>(scratch, s.N);
    for (int d = 0; d < s.D; ++d) {
      if (weights_in_place) {
        const E *hh = static_cast<const E*>(s.w[d].w_hh), *ih = static_cast<const E*>(s.w[d].w_ih);
        w_hh[d] = {hh, 3 * s.H, blocks, s.H};
        w_ih[2 * d] = {ih + 2 * s.H * s.I, s.H, columns, s.I};
        w_ih[2 * d + 1] = {ih, 2 * s.H, columns, s.I};
      } else {
        w_hh[d] = {take<E>(scratch, panels_size<E>(3 * units, s.H)), 3 * units, blocks};
        if (f.dx) {
          w_ih[2 * d] = {take<E>(scratch, panels_size<E>(units, s.I)), units, columns};
          w_ih[2 * d + 1] = {take<E>(scratch, panels_size<E>(2 * units, s.I)), 2 * units, columns};
        }
      }
      previous[d] = take<const S*>(scratch, s.N);
      dh_carry[d] = take<C>(scratch, s.B * units);
      dgates[d] = take<E>(scratch, tokens * gate_row);
      later[d] = chunk_steps < s.T ? take<E>(scratch, s.B * gate_row) : nullptr;
      if (f.dw_ih) {
        db[d] = take<C>(scratch, 4 * units);
        if (!same<S, C>) {
          dw_ih[d] = take<C>(scratch, 3 * s.H * s.I);
          dw_hh[d] = take<C>(scratch, 3 * s.H * s.H);
        }
        if (s.N > kFewTokens) {
          if (kPair<E> > 1) left[d] = take<E>(scratch, 4 * s.H * depth);
          right_x[d] = {take<E>(scratch, panels_size<E>(depth, s.I)), depth, columns};
          right_h[d] = {take<E>(scratch, panels_size<E>(depth, s.H)), depth, blocks};
        }
      }
    }
    if (!f.gates) {
      weights = new (take<LayerWeights<S>>(scratch, 1))
          LayerWeights<S>(s, blocks, chunk_steps >= s.T, sharing.workers, scratch);
      for (int d = 0; d < s.D; ++d) {
        gates[d] = take<C>(scratch, tokens * 4 * units);
        inputs[d] = copies(s.I) ? take<E>(scratch, tokens * padded_depth<E>(s.I)) : nullptr;
        states[d] = copies(s.H) ? take<E>(scratch, tokens * padded_depth<E>(s.H)) : nullptr;
      }
    }
  }

  static bool copies(int64_t n) { return !same<S, E> || padded_depth<E>(n) != n; }

  // First token and number of tokens of a chunk.
  int64_t chunk_token(int d, int64_t chunk) const {
    return steps.offset[d == 0 ? chunk * chunk_steps : s.T - imin(s.T, (chunk + 1) * chunk_steps)];
  }
  int64_t chunk_tokens(int d, int64_t chunk) const {
    return steps.offset[d == 0 ? imin(s.T, (chunk + 1) * chunk_steps) : s.T - chunk * chunk_steps] -
           chunk_token(d, chunk);
  }
  // Gate gradients of row 0 of a step of a chunk, or of the step after the chunk.
  E* step_dgates(int d, int64_t chunk, int64_t step) const {
    if (step / chunk_steps > chunk) return later[d];
    return dgates[d] + (steps.token(d, step) - chunk_token(d, chunk)) * gate_row;
  }

  void pack(const S* w, int64_t columns, int first_plane, const Panels<E>& panels, int64_t p) const;
  void prepare(int d) const;
  FASTGRU_METHOD void gate_gradients(int d, int64_t token, const C* recomputed, E* out, int64_t b, int64_t j,
                                     vec<C> dh) const;
  void step(int d, int64_t step, int64_t b0, int64_t b1, int64_t p0, int64_t p1) const;
  void run(Worker& worker) const;
  void recurrence(Worker& worker, int64_t chunk, int64_t h_panels) const;

  // recompute.inl.h
  void copy_rows(int d, int64_t token, int64_t i) const;
  void recompute(int worker, int d, int64_t token, int64_t tokens, int64_t j0, int64_t j1) const;
  void recompute_chunk(Worker& worker, int64_t chunk) const;

  // backward_products.inl.h
  void keep_first_step(int d, int64_t chunk) const;
  void input_gradient(int d, int64_t chunk, int64_t n0, int64_t n1, int64_t p0, int64_t p1) const;
  void interleave_pairs(const E* from, int64_t tokens, Plane plane, int64_t m0, int64_t m1, E* to) const;
  void outer_products(int d, Plane plane, const S* const* rows, int64_t columns, S* out, int64_t m0, int64_t m1) const;
  void weight_gradient(int d, Plane plane, int64_t tokens, const Panels<E>& right, int64_t columns, S* out, C* total,
                       int64_t p0, int64_t p1, bool first, bool last) const;
  template <int V>
  FASTGRU_METHOD void add_rows(const E* from, int64_t rows, bool first, C* total) const;
  void bias_gradient(int d, const E* from, int64_t tokens, Plane plane, bool first, bool last) const;
  void products(Worker& worker, int64_t chunk, int64_t h_panels, int64_t i_panels) const;
};

// Packs the gates from the one of plane `first_plane` on, as many as there are in `panels`.
template <class S>
inline void Backward<S>::pack(const S* w, int64_t columns, int first_plane, const Panels<E>& panels, int64_t p) const {
  const int64_t first = p * kPanel * W;
  pack_rows<E>(
      [&](int64_t k) {
        const int64_t plane = first_plane + k / units, u = k % units;
        return u < s.H ? w + (kGateOfPlane[plane] * s.H + u) * columns + first : static_cast<const S*>(nullptr);
      },
      panels.K, columns - first, panels.width(p), const_cast<E*>(panels.panel(p)));
}

template <class S>
inline void Backward<S>::prepare(int d) const {
  for (int64_t step = 0; step < s.T; ++step) {
    const int64_t t = steps.time(d, step), rows = steps.rows(d, step), rows_before = steps.rows(d, step - 1);
    const int64_t token = steps.offset[t], before = step ? steps.token(d, step - 1) : 0;
    for (int64_t b = 0; b < rows; ++b) {
      previous[d][token + b] = b < rows_before ? static_cast<const S*>(f.y) + (before + b) * s.D * s.H + d * s.H
                                               : static_cast<const S*>(s.h0) + (d * s.B + b) * s.H;
      if (d == 0) input[token + b] = input_row<S>(s, t, b, token + b);
    }
  }
}

// Computes from dL/dh after a step the gate gradients of W units of one row, and the part of dL/dh that bypasses gates.
// `recomputed`: the row's gates where the forward pass did not save them, else null.
template <class S>
FASTGRU_METHOD void Backward<S>::gate_gradients(int d, int64_t token, const C* recomputed, E* out, int64_t b, int64_t j,
                                                vec<C> dh) const {
  const int left = int(imin(W, s.H - j * W));
  if (f.dy) dh = dh + load_upto(static_cast<const S*>(f.dy) + token * s.D * s.H + d * s.H + j * W, left);
  vec<C> r, z, n, q;
  if (recomputed) {
    recomputed += j * 4 * W;
    r = load(recomputed), z = load(recomputed + W), n = load(recomputed + 2 * W), q = load(recomputed + 3 * W);
  } else {
    const S* saved = static_cast<const S*>(f.gates) + (d * s.N + token) * saved_row + saved_gate(j * W);
    const int held = plane < kSavedAlign ? left : W;
    r = load_upto(saved, held), z = load_upto(saved + plane, held), n = load_upto(saved + 2 * plane, held);
    q = load_upto(saved + 3 * plane, held);
  }
  const vec<C> h = load_upto(previous[d][token] + j * W, left);
  if (left < W) {
    // Units that do not exist met an infinite input with weights of zero: NaN, which must not reach the products.
    dh = keep<C>(dh, left), r = keep<C>(r, left), z = keep<C>(z, left), n = keep<C>(n, left), q = keep<C>(q, left);
  }
  const vec<C> da_n = dh * (C(1) - z) * (C(1) - n * n);
  out += j * W;
  store(out + kN * units, da_n);
  store(out + kR * units, da_n * q * r * (C(1) - r));
  store(out + kZ * units, dh * (h - n) * z * (C(1) - z));
  store(out + kQ * units, da_n * r);
  store(dh_carry[d] + b * units + j * W, dh * z);
}

// Computes dL/dh after `step` from the step after it (none for the last one), then the gate gradients of `step`. Step
// -1 ends in the gradient of the initial state. Rows [b0, b1), panels [p0, p1) of hidden units.
template <class S>
inline void Backward<S>::step(int d, int64_t step, int64_t b0, int64_t b1, int64_t p0, int64_t p1) const {
  const int64_t rows = steps.rows(d, step), rows_next = steps.rows(d, step + 1);
  const int64_t token = rows ? steps.token(d, step) : 0;
  const int64_t chunk = imax(step, 0) / chunk_steps;
  E* const out = rows ? step_dgates(d, chunk, step) : nullptr;
  const E* const from = rows_next ? step_dgates(d, chunk, step + 1) + kR * units : nullptr;
  const C* const recomputed = rows && !f.gates ? gates[d] + (token - chunk_token(d, chunk)) * 4 * units : nullptr;
  const auto recomputed_row = [&](int64_t b) { return recomputed ? recomputed + b * 4 * units : nullptr; };
  // The operands of a tile's gates lie far apart in memory: they are prefetched while the tile is computed.
  const auto ahead = [&](int64_t i0, int count, int64_t p, int width) {
    for (int64_t b = b0 + i0; b < imin(b0 + i0 + count, rows); ++b) {
      const int64_t u = p * kPanel * W, wide = width * W;
      if (f.gates) {
        const S* saved = static_cast<const S*>(f.gates) + (d * s.N + token + b) * saved_row;
        prefetch(saved + saved_gate(u), 4 * wide);
      }
      if (f.dy) prefetch(static_cast<const S*>(f.dy) + (token + b) * s.D * s.H + d * s.H + u, wide);
      prefetch(previous[d][token + b] + u, wide);
    }
  };
  panel_product<E>(
      imin(b1, rows_next) - b0, [&](int, int64_t i) { return from + (b0 + i) * gate_row; }, 1, &w_hh[d], p0, p1, ahead,
      [&](int64_t i0, int count, int64_t p, int width, const C* tile) {
        for (int i = 0; i < count; ++i)
          for (int v = 0; v < width; ++v) {
            const int64_t b = b0 + i0 + i, j = p * kPanel + v;
            const vec<C> dh = load(tile + (i * width + v) * W) + load(dh_carry[d] + b * units + j * W);
            if (b < rows)
              gate_gradients(d, token + b, recomputed_row(b), out + b * gate_row, b, j, dh);
            else  // the row's recurrence began at step + 1
              store_upto(static_cast<S*>(f.dh0) + (d * s.B + b) * s.H + j * W, dh, int(imin(W, s.H - j * W)));
          }
      });
  // Rows whose recurrence ends at this step.
  for (int64_t b = imax(b0, rows_next); b < imin(b1, rows); ++b)
    for (int64_t j = p0 * kPanel; j < imin(blocks, p1 * kPanel); ++j) {
      const S* dh_n = static_cast<const S*>(f.dh_n);
      gate_gradients(d, token + b, recomputed_row(b), out + b * gate_row, b, j,
                     dh_n ? load_upto(dh_n + (d * s.B + b) * s.H + j * W, int(imin(W, s.H - j * W))) : vec<C>{});
    }
}

template <class S>
inline void Backward<S>::run(Worker& worker) const {
  const int64_t h_panels = ceil_div(blocks, kPanel), i_panels = ceil_div(ceil_div(s.I, W), kPanel);
  const int64_t packed_h = weights_in_place ? 0 : h_panels,
                packed = packed_h + (f.dx && !weights_in_place ? i_panels : 0);
  worker.phase(s.D * (packed + 1 + (weights ? blocks : 0)), false, [&](int64_t item) {
    const int d = int(item % s.D);
    const int64_t i = item / s.D - 1;
    if (i < 0)
      prepare(d);
    else if (i < packed_h)
      pack(static_cast<const S*>(s.w[d].w_hh), s.H, kR, w_hh[d], i);
    else if (i < packed)
      for (int part = 0; part < 2; ++part)
        pack(static_cast<const S*>(s.w[d].w_ih), s.I, part ? kR : kN, w_ih[2 * d + part], i - packed_h);
    else
      weights->pack(d, i - packed);
  });
  for (int64_t chunk = ceil_div(s.T, chunk_steps) - 1; chunk >= 0; --chunk) {
    if (weights) recompute_chunk(worker, chunk);
    recurrence(worker, chunk, h_panels);
    products(worker, chunk, h_panels, i_panels);
  }
}

template <class S>
inline void Backward<S>::recurrence(Worker& worker, int64_t chunk, int64_t h_panels) const {
  const int64_t begin = chunk * chunk_steps, end = imin(s.T, begin + chunk_steps), last = begin ? begin : -1;
  const PanelItems items(sharing.workers, h_panels, s.B, 3 * units * kPanel * W);
  if (sharing.batch_slices) {
    worker.phase(s.D * sharing.batch_slices, false, [&](int64_t item) {
      const int d = int(item / sharing.batch_slices);
      const int64_t slice = item % sharing.batch_slices;
      const int64_t b0 = s.B * slice / sharing.batch_slices, b1 = s.B * (slice + 1) / sharing.batch_slices;
      for (int64_t t = end - 1; t >= last; --t) step(d, t, b0, b1, 0, h_panels);
    });
  } else {
    for (int64_t t = end - 1; t >= last; --t)
      worker.phase(s.D * items.count, t & 1, [&](int64_t item) {
        const int64_t i = item % items.count;
        step(int(item / items.count), t, 0, s.B, items.begin(i), items.end(i));
      });
  }
}
