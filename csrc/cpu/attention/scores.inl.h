// Scores of a row from its products q . k: scale, softcap, ALiBi, bias, and -inf where a key is hidden. Included after
// attention/visibility.inl.h, attention/dropout.inl.h and attention/exponential.inl.h.
//
//   x = scale * q_i . k_j      c = softcap * tanh(x / softcap), or x      s = c - alibi |i + offset - j| + bias
//
// Exponents of softmax are differences (s - m) * factor, never differences of products with the factor: they are exact
// however large scores are, and both passes compute the same bits.

// Up to so many queries, scores are dot products with the keys in place: packed keys would be read too seldom.
constexpr int64_t kFewQueries = 4;

template <class S, int kQueries, int kTileKeys>
struct Scores : Visibility<S, kQueries, kTileKeys> {
  using Base = Visibility<S, kQueries, kTileKeys>;
  using Base::hide;
  using Base::mask_row;
  using Base::offset;
  using Base::range;
  using Base::s;
  using Base::W;
  using typename Base::C;

  C scale, softcap, keep_scale;
  bool few;  // Lq <= kFewQueries
  // Scores are kept as products q . k, with `scale` part of `factor`: nothing but hiding is done to them.
  bool raw_scores;
  C factor;  // (s - m) * factor is the exponent, in the base of Exponential

  explicit FASTGRU_METHOD Scores(const AttentionShape& shape)
      : Base(shape),
        scale(C(s.scale)),
        softcap(C(s.softcap)),
        keep_scale(C(1 / (1 - s.dropout_p))),
        few(s.Lq <= kFewQueries),
        // Scales outside these bounds would make `factor` subnormal or infinite in float.
        raw_scores(s.softcap == 0 && !s.slopes && !s.bias.data && s.scale > 1e-30 && s.scale < 1e30),
        factor(C((raw_scores ? s.scale : 1.0) * double(Exponential<S>::log_e))) {}

  RowKey row_key(int64_t b, int64_t h, int64_t i) const { return RowKey(*s.seed, (b * s.Hq + h) * s.Lq + i); }

  // Turns the products q . k of query i and keys [j0, j0 + n) into scores, in place, whole vectors, -inf where hidden.
  // Returns the largest. d_softcap, unless null: dc/dx, written where there is a softcap.
  FASTGRU_METHOD C finish_scores(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, C* x, C* d_softcap) const {
    if (!raw_scores) return transform_scores(b, h, i, j0, n, x, d_softcap);
    const Span r = range(b, i);
    const uint8_t* mask = mask_row(b, h, i);
    vec<C> highest = splat<C>(-C(__builtin_inf()));
    for (int64_t v = 0; v < n; v += W) {
      const int64_t j = j0 + v;
      vec<C> c = load(x + v);
      if (mask || j < r.begin || j + W > r.end) {
        c = hide(c, r, mask, j);
        store(x + v, c);
      }
      highest = larger(c, highest);
    }
    return max_lanes<C>(highest);
  }

  // The same for scores that are not raw.
  FASTGRU_METHOD C transform_scores(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, C* x, C* d_softcap) const {
    const Span r = range(b, i);
    const C bottom = -C(__builtin_inf());
    const int64_t diagonal = i + offset(b);
    const S* bias = static_cast<const S*>(s.bias.data);
    if (bias) bias += b * s.bias.stride_b + h * s.bias.stride_h + i * s.bias.stride_l;
    const uint8_t* mask = mask_row(b, h, i);
    const C* slopes = static_cast<const C*>(s.slopes);
    const C alibi = slopes ? slopes[b * s.slope_stride + h] : C(0);
    vec<C> highest = splat<C>(bottom);
    for (int64_t v = 0; v < n; v += W) {
      const int64_t j = j0 + v;
      const int left = int(imin(W, s.Lk - j));
      vec<C> c = load(x + v) * scale;
      if (softcap > 0) {
        const vec<C> t = tanh<C>(c / softcap);
        c = t * softcap;
        if (d_softcap) store(d_softcap + v, C(1) - t * t);
      }
      if (slopes)
        c = fma(splat<C>(-alibi), abs<C>(C(diagonal - j) - __builtin_convertvector(lane_index<C>(), vec<C>)), c);
      if (bias) {
        const vec<C> added = s.bias.stride_k ? load_upto(bias + j, left) : splat<C>(load_one(bias));
        c = added == bottom ? splat<C>(bottom) : c + added;  // a bias of -inf hides NaN too
      }
      c = hide(c, r, mask, j);
      store(x + v, c);
      highest = larger(c, highest);
    }
    return max_lanes<C>(highest);
  }
};
