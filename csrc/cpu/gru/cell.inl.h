// The GRU cell: gates of one vector of hidden units, their biases, and where gates are saved.

// Gates of W units of one row, in two parts: the first for all rows of a tile, then the second, so that the chains of
// arithmetic of several rows are under way at a time.
// gi: [r | z | n] input part with every bias but b_hn; gh: the three recurrent products, then [r | z | product of n].
template <class C>
FASTGRU_INLINE void reset_and_update(const C* gi, C* gh) {
  constexpr int W = lanes<C>;
  store(gh, sigmoid<C>(load(gi) + load(gh)));
  store(gh + W, sigmoid<C>(load(gi + W) + load(gh + W)));
}
template <class C>
struct Gates {
  vec<C> r, z, n, q, h;
};
template <class C>
FASTGRU_INLINE Gates<C> gru_gates(const C* gi, const C* gh, vec<C> bias_q, vec<C> h) {
  constexpr int W = lanes<C>;
  Gates<C> g;
  g.r = load(gh);
  g.z = load(gh + W);
  g.q = load(gh + 2 * W) + bias_q;
  g.n = tanh<C>(fma(g.r, g.q, load(gi + 2 * W)));
  g.h = fma(g.z, h - g.n, g.n);
  return g;
}

// Biases of W units: out[r | z | n | q], the recurrent ones of r and z added in.
template <class C, class S>
static void load_biases(const GruWeights& w, int64_t H, int64_t j, C* out) {
  constexpr int W = lanes<C>;
  const int left = int(imin(W, H - j * W));
  const S* b_ih = static_cast<const S*>(w.b_ih);
  const S* b_hh = static_cast<const S*>(w.b_hh);
  for (int g = 0; g < 3; ++g) {
    const vec<C> ih = b_ih ? load_upto(b_ih + g * H + j * W, left) : vec<C>{};
    const vec<C> hh = b_hh ? load_upto(b_hh + g * H + j * W, left) : vec<C>{};
    store(out + g * W, g < 2 ? ih + hh : ih);
    if (g == 2) store(out + 3 * W, hh);
  }
}

// The place of the gates of unit u (a multiple of W) in a saved row: r, z, n, q of every kSavedAlign units side by
// side, for every W alike, so that one instruction set reads what another has saved. The next gate is `saved_plane`
// further.
FASTGRU_INLINE int64_t saved_gate(int64_t u) { return u / kSavedAlign * 4 * kSavedAlign + u % kSavedAlign; }
FASTGRU_INLINE int64_t saved_plane(int64_t H) { return imin(kSavedAlign, saved_units(H)); }

template <class S>
struct Forward {
  using C = compute_t<S>;
  static constexpr int W = lanes<C>;

  const GruForward& f;
  const GruShape& s;
  int64_t blocks;            // vectors of hidden units
  int64_t saved_row, plane;  // elements of one token in f.gates, and of one gate of up to kSavedAlign units

  explicit Forward(const GruForward& forward)
      : f(forward), s(forward.s), blocks(ceil_div(s.H, W)), saved_row(4 * saved_units(s.H)), plane(saved_plane(s.H)) {}

  // Writes the results of W units of one row: output, final state, saved gates.
  FASTGRU_METHOD void finish(int d, int64_t token, int64_t b, int64_t j, const Gates<C>& g, bool last) const {
    const int left = int(imin(W, s.H - j * W));
    store_upto(static_cast<S*>(f.y) + token * s.D * s.H + d * s.H + j * W, g.h, left);
    if (last) store_upto(static_cast<S*>(f.h_n) + (d * s.B + b) * s.H + j * W, g.h, left);
    if (f.gates) {
      S* saved = static_cast<S*>(f.gates) + (d * s.N + token) * saved_row + saved_gate(j * W);
      const int held = plane < kSavedAlign ? left : W;
      store_upto(saved, g.r, held);
      store_upto(saved + plane, g.z, held);
      store_upto(saved + 2 * plane, g.n, held);
      store_upto(saved + 3 * plane, g.q, held);
    }
  }
};
