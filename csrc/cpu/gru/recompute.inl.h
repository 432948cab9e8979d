// Gates computed again, for a backward pass whose forward pass did not save them.

template <class S>
inline void Backward<S>::copy_rows(int d, int64_t token, int64_t i) const {
  if (inputs[d]) copy_operand(input[token + i], s.I, inputs[d] + i * padded_depth<E>(s.I), padded_depth<E>(s.I));
  if (states[d]) copy_operand(previous[d][token + i], s.H, states[d] + i * padded_depth<E>(s.H), padded_depth<E>(s.H));
}

// Computes the gates of `tokens` tokens from `token` on, blocks [j0, j1). Every state is known, so nothing is
// sequential; the arithmetic is that of the forward pass.
template <class S>
inline void Backward<S>::recompute(int worker, int d, int64_t token, int64_t tokens, int64_t j0, int64_t j1) const {
  const auto row = [&](const S* const* rows, const E* copied, int64_t n, int64_t i) {
    if constexpr (same<S, E>)
      if (!copied) return rows[token + i];
    return copied + i * padded_depth<E>(n);
  };
  const auto at = [&](int64_t i, int64_t j) { return gates[d] + (i * blocks + j) * 4 * W; };
  weights->project(worker, d, tokens, [&](int64_t i) { return row(input, inputs[d], s.I, i); }, j0, j1, at);
  panel_product<E>(
      tokens, [&](int, int64_t i) { return row(previous[d], states[d], s.H, i); }, 1, &weights->w_hh[d], j0, j1,
      [&](int64_t i0, int count, int64_t j, int, C* tile) {
        const vec<C> bias_q = load(weights->biases[d] + (j * 4 + 3) * W);
        for (int i = 0; i < count; ++i) reset_and_update<C>(at(i0 + i, j), tile + i * 3 * W);
        for (int i = 0; i < count; ++i) {
          C* to = at(i0 + i, j);
          const Gates<C> g = gru_gates<C>(to, tile + i * 3 * W, bias_q, vec<C>{});
          store(to, g.r);
          store(to + W, g.z);
          store(to + 2 * W, g.n);
          store(to + 3 * W, g.q);
        }
      });
}

template <class S>
inline void Backward<S>::recompute_chunk(Worker& worker, int64_t chunk) const {
  if (copies(s.I) || copies(s.H)) {
    const int64_t part = 16;
    const int64_t parts = ceil_div(imax(chunk_tokens(0, chunk), chunk_tokens(s.D - 1, chunk)), part);
    worker.phase(s.D * parts, false, [&](int64_t item) {
      const int d = int(item / parts);
      for (int64_t i = item % parts * part; i < imin(chunk_tokens(d, chunk), (item % parts + 1) * part); ++i)
        copy_rows(d, chunk_token(d, chunk), i);
    });
  }
  const PanelItems items(sharing.workers, blocks, chunk_steps * s.B, 3 * W * (s.I + s.H));
  worker.phase(s.D * items.count, false, [&](int64_t item) {
    const int d = int(item / items.count);
    const int64_t i = item % items.count;
    recompute(worker.index(), d, chunk_token(d, chunk), chunk_tokens(d, chunk), items.begin(i), items.end(i));
  });
}
