// The products of the backward pass that do not depend on the order of steps: dx, dW_ih, dW_hh and the bias sums.

// Keeps the gate gradients of a chunk's first step for the chunk before it.
template <class S>
inline void Backward<S>::keep_first_step(int d, int64_t chunk) const {
  const int64_t step = chunk * chunk_steps;
  __builtin_memcpy(later[d], step_dgates(d, chunk, step), size_t(steps.rows(d, step) * gate_row) * sizeof(E));
}

// Computes one direction's part of dx: tokens [n0, n1) of a chunk, panels [p0, p1) of the inputs.
template <class S>
inline void Backward<S>::input_gradient(int d, int64_t chunk, int64_t n0, int64_t n1, int64_t p0, int64_t p1) const {
  const E* from = dgates[d];
  const int64_t token = chunk_token(d, chunk);
  // The direction that comes to a token in the later phase adds to what the other has written.
  const int64_t second = imax(0, s.T - (chunk + 1 - d) * chunk_steps);  // so many steps of this direction
  const auto adds = [&](int64_t n) {
    return s.D == 2 && (d == 0 ? n < steps.offset[second] : n >= steps.offset[s.T - second]);
  };
  panel_product<E>(
      n1 - n0, [&](int part, int64_t i) { return from + (n0 + i) * gate_row + (part ? kR : kN) * units; }, 2,
      &w_ih[2 * d], p0, p1,
      [&](int64_t i0, int count, int64_t p, int width, const C* tile) {
        for (int i = 0; i < count; ++i)
          for (int v = 0; v < width; ++v) {
            const int64_t column = (p * kPanel + v) * W;
            const int left = int(imin(W, s.I - column));
            S* to = static_cast<S*>(f.dx) + (token + n0 + i0 + i) * s.I + column;
            const vec<C> sum = load(tile + (i * width + v) * W);
            store_upto(to, adds(token + n0 + i0 + i) ? load_upto(to, left) + sum : sum, left);
          }
      });
}

// Copies gate gradients [m0, m1) of one plane over the tokens of a chunk in pairs, tile by tile: out[token /
// 2][unit][2], zero beyond the last token.
template <class S>
inline void Backward<S>::interleave_pairs(const E* from, int64_t tokens, Plane plane, int64_t m0, int64_t m1,
                                          E* to) const {
  constexpr int P = kPair<E>;
  const int64_t padded = padded_depth<E>(tokens);
  for (int64_t n = 0; n < padded; ++n) {
    const E* row = from + n * gate_row + plane * units;
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t count = imin(kRows, s.H - m);
      E* out = to + m * padded + n / P * count * P + n % P;
      for (int64_t i = 0; i < count; ++i) out[i * P] = n < tokens ? row[m + i] : E{};
    }
  }
}

// Computes the weight gradient of few tokens, where writing it is all the work: units [m0, m1), row by row as it lies
// in memory.
template <class S>
inline void Backward<S>::outer_products(int d, Plane plane, const S* const* rows, int64_t columns, S* out, int64_t m0,
                                        int64_t m1) const {
  const auto write = [&](int tokens) __attribute__((always_inline)) {
    for (int64_t m = m0; m < m1; ++m) {
      vec<C> g[kFewTokens];
      for (int n = 0; n < tokens; ++n) g[n] = splat<C>(load_one(dgates[d] + n * gate_row + plane * units + m));
      const auto sum = [&](auto&& load_row) __attribute__((always_inline)) {
        vec<C> total = {};
        for (int n = 0; n < tokens; ++n) total = fma(g[n], load_row(rows[n]), total);
        return total;
      };
      S* to = out + m * columns;
      int64_t column = 0;
      for (; column + W <= columns; column += W) store(to + column, sum([&](const S* x) { return load(x + column); }));
      const int left = int(columns - column);
      if (left) store_n(to + column, sum([&](const S* x) { return load_n(x + column, left); }), left);
    }
  };
  if (s.N == 1)
    write(1);
  else
    write(int(s.N));
}

// Adds a chunk's part to one gate of dw_ih or dw_hh: out[H, columns] += dgates[plane]^T rows, panels [p0, p1) of its
// columns. `total`: the sum in the compute type, where `out` is of another.
template <class S>
inline void Backward<S>::weight_gradient(int d, Plane plane, int64_t tokens, const Panels<E>& right, int64_t columns,
                                         S* out, C* total, int64_t p0, int64_t p1, bool first, bool last) const {
  // Chains of equal length: a short rest would cost as much as a full one.
  const int64_t depth = padded_depth<E>(ceil_div(tokens, ceil_div(tokens, chain_depth(s)))),
                padded = padded_depth<E>(tokens);
  for (int64_t m = 0; m < s.H; m += kRows) {
    const int count = int(imin(kRows, s.H - m));
    const bool pairs = kPair<E> > 1;
    const E* const from = pairs ? left[d] + (plane * s.H + m) * padded : dgates[d] + plane * units + m;
    const int64_t lda = pairs ? count * kPair<E> : gate_row;
    for (int64_t p = p0; p < p1; ++p) {
      alignas(64) C tile[kTileElements<C>];
      const int width = right.width(p);
      // Prefetched while the tile is computed.
      for (int i = 0; i < count; ++i) {
        const int64_t at = (m + i) * columns + p * kPanel * W;
        if (same<S, C>)
          prefetch(out + at, width * W);
        else
          prefetch(total + at, width * W);
      }
      for (int64_t n = 0; n < padded; n += depth) {
        const E* a = from + n / kPair<E> * lda;
        TileTable<E, true>::narrow[width - 1][count - 1](imin(depth, padded - n), &a, lda,
                                                         right.data + p * kPanel * W * padded + n * width * W,
                                                         right.row(width), 0, tile, n > 0);
      }
      for (int i = 0; i < count; ++i)
        for (int v = 0; v < width; ++v) {
          const int64_t column = (p * kPanel + v) * W, at = (m + i) * columns + column;
          const int left = int(imin(W, columns - column));
          vec<C> sum = load(tile + (i * width + v) * W);
          if constexpr (same<S, C>) {
            store_upto(out + at, first ? sum : load_upto(out + at, left) + sum, left);
          } else {
            if (!first) sum = load_upto(total + at, left) + sum;
            if (last)
              store_upto(out + at, sum, left);
            else
              store_upto(total + at, sum, left);
          }
        }
    }
  }
}

// total[V vectors] += the sum of `rows` rows, one chain.
template <class S>
template <int V>
FASTGRU_METHOD void Backward<S>::add_rows(const E* from, int64_t rows, bool first, C* total) const {
  vec<C> sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = load(from + v * W);
  for (int64_t n = 1; n < rows; ++n)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] = sum[v] + load(from + n * gate_row + v * W);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(total + v * W, first ? sum[v] : load(total + v * W) + sum[v]);
}

// Adds a chunk's part to the sum of one plane, which the bias gradients of its gate take at the end.
template <class S>
inline void Backward<S>::bias_gradient(int d, const E* from, int64_t tokens, Plane plane, bool first, bool last) const {
  C* total = db[d] + plane * units;
  for (int64_t n = 0; n < tokens; n += kBiasDepth) {
    const E* rows = from + n * gate_row + plane * units;
    const int64_t count = imin(kBiasDepth, tokens - n);
    int64_t j = 0;
    for (; j + 4 * W <= units; j += 4 * W) add_rows<4>(rows + j, count, first && n == 0, total + j);
    for (; j < units; j += W) add_rows<1>(rows + j, count, first && n == 0, total + j);
  }
  if (!last) return;
  const int64_t to = (3 * d + kGateOfPlane[plane]) * s.H;
  for (int64_t j = 0; j < blocks; ++j) {
    const int left = int(imin(W, s.H - j * W));
    if (plane != kQ) store_upto(static_cast<S*>(f.db_ih) + to + j * W, load(total + j * W), left);
    if (plane != kN) store_upto(static_cast<S*>(f.db_hh) + to + j * W, load(total + j * W), left);
  }
}

// Computes everything that depends on the gate gradients of a chunk alone.
template <class S>
inline void Backward<S>::products(Worker& worker, int64_t chunk, int64_t h_panels, int64_t i_panels) const {
  const bool first = (chunk + 1) * chunk_steps >= s.T, last = chunk == 0;
  const int64_t most = imax(chunk_tokens(0, chunk), chunk_tokens(s.D - 1, chunk));
  const bool few = s.N <= kFewTokens;
  if (f.dw_ih && !few) {
    const int64_t paired = kPair<E> > 1 ? 4 * ceil_div(s.H, kUnitGroup) : 0;
    const int64_t per_direction = paired + i_panels + h_panels;
    worker.phase(s.D * per_direction, false, [&](int64_t item) {
      const int d = int(item / per_direction);
      const int64_t tokens = chunk_tokens(d, chunk), token = chunk_token(d, chunk);
      int64_t i = item % per_direction;
      if (i < paired) {
        const int64_t m0 = i / 4 * kUnitGroup, padded = padded_depth<E>(tokens);
        return interleave_pairs(dgates[d], tokens, Plane(i % 4), m0, imin(s.H, m0 + kUnitGroup),
                                left[d] + i % 4 * s.H * padded);
      }
      i -= paired;
      const bool ih = i < i_panels;
      const Panels<E>& right = ih ? right_x[d] : right_h[d];
      const S* const* rows = (ih ? input : previous[d]) + token;
      const int64_t p = ih ? i : i - i_panels, column = p * kPanel * W;
      pack_rows<E>([&](int64_t k) { return rows[k] + column; }, tokens, (ih ? s.I : s.H) - column, right.width(p),
                   const_cast<E*>(right.data) + column * padded_depth<E>(tokens));
    });
  }

  static constexpr int kInputPlanes[3] = {kN, kR, kZ}, kStatePlanes[3] = {kR, kZ, kQ};
  const int64_t x_groups = ceil_div(i_panels, kGroup), unit_groups = ceil_div(s.H, kUnitGroup);
  const int64_t i_groups = few ? unit_groups : x_groups, h_groups = few ? unit_groups : ceil_div(h_panels, kGroup);
  const int64_t dx_items = f.dx ? ceil_div(most, kTokenGroup) * x_groups : 0;
  const int64_t ih_items = f.dw_ih ? 3 * i_groups : 0, hh_items = f.dw_ih ? 3 * h_groups : 0;
  const int64_t bias_items = f.dw_ih ? 4 : 0, per_direction = ih_items + hh_items + bias_items;
  const auto input_item = [&](int d, int64_t item) {
    const int64_t n0 = item / x_groups * kTokenGroup, p0 = item % x_groups * kGroup;
    const int64_t n1 = imin(chunk_tokens(d, chunk), n0 + kTokenGroup);
    if (n0 < n1) input_gradient(d, chunk, n0, n1, p0, imin(i_panels, p0 + kGroup));
  };
  const int64_t kept = last ? 0 : s.D;
  worker.phase(kept + dx_items + s.D * per_direction, false, [&](int64_t item) {
    if (item < kept) return keep_first_step(int(item), chunk);
    item -= kept;
    if (item < dx_items) return input_item(0, item);
    item -= dx_items;
    const int d = int(item / per_direction);
    item %= per_direction;
    const E* from = dgates[d];
    const int64_t tokens = chunk_tokens(d, chunk);
    if (item >= ih_items + hh_items)
      return bias_gradient(d, from, tokens, Plane(item - ih_items - hh_items), first, last);
    const bool ih = item < ih_items;
    const int64_t i = ih ? item : item - ih_items, groups = ih ? i_groups : h_groups;
    const int64_t panels = ih ? i_panels : h_panels, columns = ih ? s.I : s.H;
    const Plane plane = Plane((ih ? kInputPlanes : kStatePlanes)[i / groups]);
    const int64_t row = kGateOfPlane[plane] * s.H;
    S* out = static_cast<S*>(ih ? f.dw_ih : f.dw_hh) + (3 * d * s.H + row) * columns;
    if (few) {
      const int64_t m0 = i % groups * kUnitGroup;
      return outer_products(d, plane, ih ? input : previous[d], columns, out, m0, imin(s.H, m0 + kUnitGroup));
    }
    const int64_t p0 = i % groups * kGroup, p1 = imin(panels, p0 + kGroup);
    C* total = same<S, C> ? nullptr : (ih ? dw_ih : dw_hh)[d] + row * columns;
    weight_gradient(d, plane, tokens, ih ? right_x[d] : right_h[d], columns, out, total, p0, p1, first, last);
  });
  if (s.D == 2 && f.dx) worker.phase(dx_items, false, [&](int64_t item) { input_item(1, item); });
}
