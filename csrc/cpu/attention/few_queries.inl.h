// Forward pass for up to kFewQueries queries, such as decoding: reads keys and values in place, without packing.
// Included after attention/forward.inl.h.

// out[0 .. V vectors) = sum_j x[j] v[j]; a weight of zero hides NaN and infinity of its value. `left`: columns of v.
template <class S>
template <int V>
inline void AttentionForwardPass<S>::weighted_sum(const C* x, int64_t n, const S* v, int64_t ld, int64_t left, C* out) {
  vec<C> sums[V];
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) sums[i] = vec<C>{};
  for (int64_t j = 0; j < n; ++j, v += ld) {
    if (x[j] == C(0)) continue;
    if (left >= V * W) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sums[i] = fma(splat<C>(x[j]), load(v + i * W), sums[i]);
    } else {
      sums[0] = fma(splat<C>(x[j]), load_upto(v, int(left)), sums[0]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) store(out + i * W, sums[i]);
}

// All queries of one head, one after the other: dot products with the keys, softmax, weighted sum of the values.
template <class S>
inline void AttentionForwardPass<S>::few_queries(const PerWorker& own, int64_t b, int64_t h) const {
  const int64_t key_head = h / group;
  for (int64_t i = 0; i < s.Lq; ++i) {
    const Span r = this->range(b, i);
    C l = C(0), m = C(0);
    const int64_t n = r.end - r.begin;
    copy_operand(s.q.template row<const S>(b, h, i), s.D, own.few_q, Base::padded(s.D));
    for (int64_t j = 0; j < n; j += W) {
      store(own.x + j, this->dot_products(s.k, b, key_head, r.begin + j, r.end - 1, own.few_q));
    }
    if (n > 0) {
      m = shift(this->finish_scores(b, h, i, r.begin, n, own.x, nullptr));
      l = sum_lanes<C>(weights(b, h, i, r.begin, n, own.x, m, own.x));
    }
    const S* values = s.v.template row<const S>(b, key_head, r.begin);
    for (int64_t d = 0; d < s.Dv;) {
      const bool wide = d + 4 * W <= s.Dv;
      (wide ? weighted_sum<4> : weighted_sum<1>)(own.x, n, values + d, s.v.stride_l, s.Dv - d, own.out + d);
      d += wide ? 4 * W : W;
    }
    finish_row(b, h, i, own.out, m, l);
  }
}
