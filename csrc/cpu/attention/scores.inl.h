// Scores from products. Included after attention/visibility.inl.h.

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
  bool few;  // queries: their scores are dot products with the keys as they lie
  // Nothing is done to the scores but hiding some: then the products stay as they are until the power is taken.
  bool raw_scores;
  C factor;  // what takes scores (raw_scores: products) to the argument of the power

  explicit FASTGRU_METHOD Scores(const AttentionShape& shape)
      : Base(shape),
        scale(C(s.scale)),
        softcap(C(s.softcap)),
        keep_scale(C(1 / (1 - s.dropout_p))),
        few(s.Lq <= kFewQueries),
        // (A factor near the ends of float's range would lose digits, or overflow.)
        raw_scores(s.softcap == 0 && !s.slopes && !s.bias.data && s.scale > 1e-30 && s.scale < 1e30),
        factor(C((raw_scores ? s.scale : 1.0) * double(Exponential<S>::log_e))) {}

  RowKey row_key(int64_t b, int64_t h, int64_t i) const { return RowKey(*s.seed, (b * s.Hq + h) * s.Lq + i); }

  // What the power is taken of, but for `factor` and the maximum, in place of the products q . k of query i and keys
  // [j0, j0 + n); whole vectors, -inf where hidden. Returns the largest.
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

  // The scores of query i and keys [j0, j0 + n), in place of the products q . k; whole vectors. Returns the largest.
  // With `slope`, also the derivative of softcap.
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
        c = added == bottom ? splat<C>(bottom) : c + added;  // it hides NaN too
      }
      c = hide(c, r, mask, j);
      store(x + v, c);
      highest = larger(c, highest);
    }
    return max_lanes<C>(highest);
  }
};
