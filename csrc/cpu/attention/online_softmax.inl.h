// Softmax, a tile of keys at a time. Included after attention/operands.inl.h.

template <class S>
struct OnlineSoftmax : Operands<S, kForwardQueries, kForwardKeys> {
  using Base = Operands<S, kForwardQueries, kForwardKeys>;
  using Base::kKeys;
  using Base::s;
  using Base::W;
  using typename Base::C;
  using typename Base::E;

  // What the rows have seen so far. Powers are taken against a reference: zero, while the largest score is near enough
  // to it; else a row's largest score when it was last set, which is when a tile of keys first had one too far above
  // it. A row that sees one key has that key's score: its weight is exactly 1, and its output the value.
  struct SoftmaxState {
    C m[kForwardQueries + W];              // the shift, a score; -inf: nothing seen
    C limit[kForwardQueries + W];          // the score beyond which it is set again
    vec<C> l[kForwardQueries];             // the sum of powers, a part per lane
    bool begun[kForwardQueries / kStrip];  // strips with something in own.out
  };
  // How far the largest score of a row may be above its reference, and below it at first, as an argument of the power.
  // Nothing is lost by it: weights are floating point, and divided by their sum in the end.
  static constexpr C kSlack = C(8), kBelow = C(-40);

  const AttentionForward& f;
  C slack, below;  // kSlack and kBelow, in scores
  bool fused_exp;  // weights are made of products while these are in registers, of which there are enough

  explicit FASTGRU_METHOD OnlineSoftmax(const AttentionForward& forward)
      : Base(forward.s),
        f(forward),
        slack(kSlack / this->factor),
        below(kBelow / this->factor),
        fused_exp(FASTGRU_VECTOR_BYTES == 64 && this->raw_scores && !s.mask.data && !s.seed && s.D <= kDepth &&
                  s.Lk > 1) {}

  void finish_row(int64_t b, int64_t h, int64_t i, const C* out, C m, C l) const {
    // A sum of zero: nothing was seen.
    const C factor = l == C(0) ? C(0) : (s.seed ? this->keep_scale : C(1)) / l;
    Base::write_row(out, s.Dv, factor, f.out.row<S>(b, h, i));
    const int64_t at = (b * s.Hq + h) * s.Lq + i;
    if (f.statistics) {
      static_cast<C*>(f.statistics)[at] = m;
      static_cast<C*>(f.statistics)[s.B * s.Hq * s.Lq + at] = l;
    }
    if (!f.lse) return;
    // logl, because the log of double asks for a newer glibc than the wheels promise.
    static_cast<C*>(f.lse)[at] = l == C(0) ? -C(__builtin_inf())
                                           : m * (this->raw_scores ? this->scale : C(1)) +
                                                 (same<C, double> ? C(__builtin_logl(l)) : C(__builtin_logf(float(l))));
  }

  // Weights of n scores against the reference `top`, dropped where dropout says; returns the sums of the lanes before
  // that.
  template <class To>
  FASTGRU_METHOD vec<C> weights(int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, const C* x, C m, To* p) const {
    const vec<C> factor = splat<C>(this->factor), shift = splat<C>(m);
    vec<C> sum = {};
    if (!s.seed) {
      for (int64_t v = 0; v < n; v += W) {
        const vec<C> e = Exponential<S>::of((load(x + v) - shift) * factor);
        sum += e;
        store_operand(p + v, e);
      }
      return sum;
    }
    const RowKey key = this->row_key(b, h, i);
    for (int64_t v = 0; v < n; v += W) {
      const vec<C> e = Exponential<S>::of((load(x + v) - shift) * factor);
      sum += e;
      store_operand(p + v, keep_mask<C>(key, j0 + v, s.drop_below) ? e : vec<C>{});
    }
    return sum;
  }

  // What is taken from scores; a NaN is not above -inf, and is seen all the same.
  static C shift(C m) { return m == -C(__builtin_inf()) ? C(0) : m; }

  // Whether one of n scores, whole vectors, is not hidden.
  static bool sees_one(const C* x, int64_t n) {
    int seen = 0;
    for (int64_t v = 0; v < n; v += W) {
      if (max_lanes<C>(load(x + v)) == -C(__builtin_inf())) continue;
      for (int64_t j = v; j < v + W; ++j)
        if (x[j] > -C(__builtin_inf()) && ++seen > 1) return false;
    }
    return seen == 1;
  }

  // Sets the references anew where a score of the strip is above the limit, or the first ones are far below zero.
  // decay: what takes powers against the old reference to the new one. Both arrays go W beyond kStrip, highest with
  // -inf.
  FASTGRU_METHOD void update_maxima(SoftmaxState& state, int64_t r0, const C* highest, C* decay) const {
    const C bottom = -C(__builtin_inf());
    for (int64_t i = 0; i < kStrip; i += W) {
      const vec<C> high = load(highest + i), limit = load(state.limit + r0 + i), m = load(state.m + r0 + i);
      const auto first = (m == bottom) & (high > bottom), set = (high > limit) | (first & (high < below));
      const vec<C> next = set ? high : first ? vec<C>{} : m;
      store(decay + i, set ? Exponential<S>::of((m - next) * this->factor) : splat<C>(C(1)));
      store(state.m + r0 + i, next);
      store(state.limit + r0 + i, set ? high + slack : limit);
    }
  }

  // The weights of a strip and all n keys of a tile, in p, if the references stay as they are: otherwise returns
  // false. The scores never leave the registers. Those of some vectors of keys turn into weights between the steps of
  // the product for the next: a processor does not look far enough ahead to find anything to do beside a power by
  // itself.
  bool fused_weights(E* p, SoftmaxState& state, const Left<E>& q, const E* packed_keys, int64_t r0, int64_t n) const {
    constexpr int V = kAcross / 2, P = kPair<E>, kExponentials = kStrip * V;
    const Right<E> keys = Base::as_columns(packed_keys, n, s.D);
    const vec<C> factor = splat<C>(this->factor), bottom = splat<C>(-C(__builtin_inf()));
    const C* limit = state.limit + r0;
    C* m = state.m + r0;
    C start[kStrip];
    vec<C> sums[kStrip], row_max[kStrip];
    bool first = false;  // for a row
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      first |= m[i] == -C(__builtin_inf());
      start[i] = shift(m[i]);
      sums[i] = vec<C>{}, row_max[i] = bottom;
    }
    const E* row[kStrip];
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) row[i] = q.data + i * q.row;
    const int64_t steps = keys.depth / P, each = steps / kExponentials, more = steps % kExponentials,
                  blocks = ceil_div(n, V * W);
    vec<C> x[kStrip][V];
    for (int64_t block = 0; block <= blocks; ++block) {
      const int64_t g = imin(block, blocks - 1) / 2, stride = keys.step(g);
      // The last vector of a group may be missing: then what comes after it is computed with, and hidden.
      const E* b = keys.group(g) + block % 2 * V * W * P;
      int64_t at = 0;
      vec<C> next[kStrip][V];
      clear<C, V>(next);
      if (block == 0)
        for (; at < steps; ++at, b += stride) strip_step<E, V>(row, at * P, b, next);
      else
#pragma GCC unroll 8
        for (int i = 0; i < kStrip; ++i) {
          vec<C> sum = sums[i];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            if (block < blocks)
              for (const int64_t end = at + each + (i * V + v < more); at < end; ++at, b += stride)
                strip_step<E, V>(row, at * P, b, next);
            x[i][v] = Exponential<S>::of((x[i][v] - splat<C>(start[i])) * factor);
            sum += x[i][v];
          }
          sums[i] = sum;
          store_operands<V>(p + i * kKeys + (block - 1) * V * W, x[i]);
        }
      if (block == blocks) break;
      if ((block + 1) * V * W > n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const auto seen = Base::inside({0, n}, (block * V + v) * W);
#pragma GCC unroll 8
          for (int i = 0; i < kStrip; ++i) next[i][v] = seen ? next[i][v] : bottom;
        }
      vec<C> above = bottom;
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i) {
        vec<C> highest = bottom;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[i][v] = next[i][v], highest = larger(x[i][v], highest);
        if (first) row_max[i] = larger(highest, row_max[i]);
        above = larger(highest - limit[i], above);
      }
      if (any_positive<C>(above)) return false;
    }
    if (first)
      for (int64_t i = 0; i < kStrip; ++i)
        if (m[i] == -C(__builtin_inf()) && !any_positive<C>(row_max[i] - below)) return false;
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) m[i] = start[i], state.l[r0 + i] += sums[i];
    return true;
  }
};
