// Online softmax with a lazily updated maximum, for the forward pass. Included after attention/operands.inl.h.
//
// Over tiles of keys, for each row:
//   m' = m unless a score is above m + slack, else the row's largest score      decay = exp(m - m')
//   p_j = exp(s_j - m')      l' = decay l + sum_j p_j      o' = decay o + sum_j drop(p_j) v_j
// and in the end o / l and lse = m + log l. Any m near the maximum does: weights are floating point and divided by
// their sum, so a slack of 2^8 loses nothing. m starts at 0 and seldom changes, so exp need not wait for a maximum: it
// is fused into the registers of the product where no mask, bias, softcap or dropout applies (fused_weights()).

template <class S>
struct OnlineSoftmax : Operands<S, kForwardQueries, kForwardKeys> {
  using Base = Operands<S, kForwardQueries, kForwardKeys>;
  using Base::kKeys;
  using Base::s;
  using Base::W;
  using typename Base::C;
  using typename Base::E;

  // Softmax state of the rows of a query tile. A row that sees one key has that key's score as m: its weight is exactly
  // 1, and its output the value.
  struct SoftmaxState {
    C m[kForwardQueries + W];              // lazily updated maximum; -inf: no key seen yet
    C limit[kForwardQueries + W];          // the score above which m is updated
    vec<C> l[kForwardQueries];             // sum of exponentials, a partial sum in each lane
    bool begun[kForwardQueries / kStrip];  // strips with something in own.out
  };
  // How far the largest score of a row may be above m, and the first tile's largest score below 0, in exponents of the
  // base of Exponential.
  static constexpr C kSlack = C(8), kBelow = C(-40);

  const AttentionForward& f;
  C slack, below;  // kSlack and kBelow, in scores
  bool fused_exp;  // exp is fused into the product, which takes 32 registers

  explicit FASTGRU_METHOD OnlineSoftmax(const AttentionForward& forward)
      : Base(forward.s),
        f(forward),
        slack(kSlack / this->factor),
        below(kBelow / this->factor),
        fused_exp(FASTGRU_VECTOR_BYTES == 64 && this->raw_scores && !s.mask.data && !s.seed && s.D <= kDepth &&
                  s.Lk > 1) {}

  // Writes a row of the output from `out`, its unnormalised sum, and m, l and lse.
  void finish_row(int64_t b, int64_t h, int64_t i, const C* out, C m, C l) const {
    // l = 0: the row saw no key.
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

  // p = exp(x - m), unnormalised, of n scores of row i and keys from j0, zero where dropped. Returns partial sums, one
  // in each lane, dropped weights included.
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

  // What is subtracted from scores: m, or 0 while m is -inf. (A row whose scores are NaN keeps m = -inf, and is seen.)
  static C shift(C m) { return m == -C(__builtin_inf()) ? C(0) : m; }

  // Whether exactly one of n scores, whole vectors, is above -inf.
  static bool sees_one(const C* x, int64_t n) {
    int seen = 0;
    for (int64_t v = 0; v < n; v += W) {
      if (max_lanes<C>(load(x + v)) == -C(__builtin_inf())) continue;
      for (int64_t j = v; j < v + W; ++j)
        if (x[j] > -C(__builtin_inf()) && ++seen > 1) return false;
    }
    return seen == 1;
  }

  // Updates m of a strip where its highest score is above the limit, or the first one is more than kBelow below 0.
  // decay[i] = exp(old m - new m). Both arrays have kStrip + W elements, `highest` with -inf beyond kStrip.
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

  // p[kStrip][kKeys] = weights of a strip and all n keys of a tile, with exp fused into the product's registers.
  // Returns false, and leaves the state as it was, where m of a row has to change.
  // Software pipelining: the exponentials of one block of V vectors interleave with the next block's multiply-adds,
  // because the out-of-order window is too short otherwise.
  bool fused_weights(E* p, SoftmaxState& state, const Left<E>& q, const E* packed_keys, int64_t r0, int64_t n) const {
    constexpr int V = kAcross / 2, P = kPair<E>, kExponentials = kStrip * V;
    const Right<E> keys = Base::as_columns(packed_keys, n, s.D);
    const vec<C> factor = splat<C>(this->factor), bottom = splat<C>(-C(__builtin_inf()));
    const C* limit = state.limit + r0;
    C* m = state.m + r0;
    C start[kStrip];
    vec<C> sums[kStrip], row_max[kStrip];
    bool first = false;  // whether a row has not seen a key yet
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
      // The last group may have an odd number of vectors: one vector beyond it is then read, and hidden below.
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
