// Backward pass of attention on the CPU; equations in types.h. Included after attention/forward.inl.h.
//
// One item is one key head. Its dk and dv are sums of one worker, in that worker's scratch: no atomics, and results do
// not depend on the number of threads. For every query tile of the head's group and every key tile that it sees:
//   1. a strip at a time: p = exp(s - m) / l from the saved m and l, then ds, dx and dq += dx k;
//   2. for the whole query tile: dk += dx^T q, dv += drop(p)^T do.
// With a bias gradient, keys and values are packed in a phase before, and bias_gradient.inl.h is a phase after it.

template <class S>
struct AttentionBackwardPass : Operands<S, kBackwardQueries, kBackwardKeys> {
  using Base = Operands<S, kBackwardQueries, kBackwardKeys>;
  using Base::few;
  using Base::group;
  using Base::key_tiles;
  using Base::kKeys;
  using Base::query_tiles;
  using Base::s;
  using Base::tile_rows;
  using Base::W;
  using typename Base::C;
  using typename Base::E;

  struct PerWorker {
    E *q, *d_out;                // [kBackwardQueries][padded D], [kBackwardQueries][padded Dv]
    E *packed_q, *packed_d_out;  // the same as rows of a right operand
    C *delta, *m, *inverse_l;    // [kBackwardQueries]; m and 1 / l of the forward pass
    C* few_q;                    // [padded D], few queries only
    C* weights;                  // [kKeys], with dropout only: p of a row before it
    // drop(p), ds and then dx, dc/dx of softcap: [kBackwardQueries][kKeys], one strip of it where E is not C.
    C *p, *ds, *d_softcap;
    E* dx;                  // [kStrip][kKeys], as an operand; null where E is C
    E *p_pairs, *dx_pairs;  // [kBackwardQueries / 2][kKeys][2]: the same of all strips, transposed; null where E is C
    C* dq;                  // [kBackwardQueries][padded D]
    C *dk, *dv;             // [Lk and a strip][padded D], [Lk and a strip][padded Dv]
    S* finite;              // [max(kKeys, kBackwardQueries)][max(D, Dv)]
    bool* begun;            // [key_tiles]: dk and dv hold something
  };

  const AttentionBackward& f;
  int workers;
  int64_t key_slot, value_slot, row_slot;
  // Keys and values as columns, keys as rows, [heads][key_tiles][slot]: one head for each worker, or all heads for a
  // bias gradient.
  int64_t heads;
  E *packed_keys, *packed_values, *packed_rows;
  bool* keys_nonfinite;
  C* d_bias;
  int64_t bias_elements;
  PerWorker per_worker[kMaxWorkers];

  AttentionBackwardPass(const AttentionBackward& backward, const Parallel& parallel, const Scratch& scratch)
      : Base(backward.s),
        f(backward),
        workers(f.d_bias ? worth(parallel) : int(imax(1, imin(s.B * s.Hk, worth(parallel))))),
        key_slot(panels_size<E>(s.D, imin(kKeys, s.Lk))),
        value_slot(panels_size<E>(s.Dv, imin(kKeys, s.Lk))),
        row_slot(panels_size<E>(imin(kKeys, s.Lk), s.D)),
        bias_elements(1),
        heads(f.d_bias ? s.B * s.Hk : workers) {
    const int64_t slots = heads * key_tiles;
    packed_keys = take<E>(scratch, few ? 0 : slots * key_slot);
    packed_values = take<E>(scratch, slots * value_slot);
    packed_rows = take<E>(scratch, slots * row_slot);
    keys_nonfinite = take<bool>(scratch, slots);
    for (const int64_t size : f.d_bias_shape) bias_elements *= size;
    if (f.d_bias) d_bias = same<S, C> ? static_cast<C*>(f.d_bias) : take<C>(scratch, bias_elements);
    for (int w = 0; w < workers; ++w) {
      PerWorker& own = per_worker[w];
      own.q = take<E>(scratch, kBackwardQueries * padded_depth<E>(s.D));
      own.d_out = take<E>(scratch, kBackwardQueries * padded_depth<E>(s.Dv));
      own.packed_q = take<E>(scratch, panels_size<E>(kBackwardQueries, s.D));
      own.packed_d_out = take<E>(scratch, panels_size<E>(kBackwardQueries, s.Dv));
      own.delta = take<C>(scratch, kBackwardQueries);
      own.m = take<C>(scratch, kBackwardQueries);
      own.inverse_l = take<C>(scratch, kBackwardQueries);
      own.weights = s.seed ? take<C>(scratch, kKeys) : nullptr;
      own.few_q = few ? take<C>(scratch, Base::padded(s.D)) : nullptr;
      const int64_t rows = same<E, C> ? kBackwardQueries : kStrip;
      own.p = take<C>(scratch, rows * kKeys);
      own.ds = take<C>(scratch, rows * kKeys);
      own.d_softcap = this->softcap > 0 ? take<C>(scratch, kStrip * kKeys) : nullptr;
      own.dx = same<E, C> ? nullptr : take<E>(scratch, kStrip * kKeys);
      own.p_pairs = same<E, C> ? nullptr : take<E>(scratch, kBackwardQueries * kKeys);
      own.dx_pairs = same<E, C> ? nullptr : take<E>(scratch, kBackwardQueries * kKeys);
      own.dq = take<C>(scratch, kBackwardQueries * Base::padded(s.D));
      own.dk = take<C>(scratch, (s.Lk + kStrip) * Base::padded(s.D));
      own.dv = take<C>(scratch, (s.Lk + kStrip) * Base::padded(s.Dv));
      own.begun = take<bool>(scratch, key_tiles);
      own.finite = take<S>(scratch, imax(kKeys, kBackwardQueries) * imax(s.D, s.Dv));
    }
  }

  int worth(const Parallel& parallel) const {
    return worth_threads(parallel, 5.0 * s.B * s.Hq * s.Lq * s.Lk * (s.D + s.Dv),
                         double(s.B * s.Hk * s.Lk * (s.D + s.Dv) * int64_t(sizeof(S))));
  }

  // Index of the packed tile of a key head.
  int64_t slot(const PerWorker& own, int64_t b, int64_t hk, int64_t tile) const {
    return (f.d_bias ? b * s.Hk + hk : &own - per_worker) * key_tiles + tile;
  }

  void pack(const PerWorker& own, int64_t b, int64_t h, int64_t tile) const {
    if (tile * kKeys >= this->keys(b)) return;
    const int64_t j0 = tile * kKeys, n = this->tile_keys(tile), at = slot(own, b, h, tile);
    if (!few) this->pack_as_columns(s.k, b, h, j0, n, s.D, packed_keys + at * key_slot);
    this->pack_as_columns(s.v, b, h, j0, n, s.Dv, packed_values + at * value_slot);
    keys_nonfinite[at] = this->pack_as_rows(s.k, b, h, j0, n, s.D, own.finite, packed_rows + at * row_slot);
  }

  // Loads operands, m, 1 / l and delta of a query tile.
  void load_queries(const PerWorker& own, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
    this->copy_rows(s.q, b, h, i0, rows, s.D, own.q);
    if (f.d_out.data)
      this->copy_rows(f.d_out, b, h, i0, rows, s.Dv, own.d_out);
    else
      __builtin_memset(own.d_out, 0, size_t(ceil_div(rows, kStrip) * kStrip * padded_depth<E>(s.Dv)) * sizeof(E));
    const C* statistics = static_cast<const C*>(f.statistics);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (b * s.Hq + h) * s.Lq + i0 + i;
      const C l = statistics[s.B * s.Hq * s.Lq + at];
      own.m[i] = statistics[at];
      own.inverse_l[i] = l == C(0) ? C(0) : C(1) / l;  // 0: a row that saw no key
      // delta = do . o; rows that see one tile compute it in score_gradients().
      C delta = C(0);
      if (f.d_out.data && !sees_one_tile(this->range(b, i0 + i)))
        // l = 1: the row may see one key only, whose v is o. Then dp - delta has to be exactly 0.
        delta = l == C(1) ? product_with_output(own, b, h, i0, i) : dot_output(b, h, i0 + i);
      own.delta[i] = delta - (f.d_lse ? static_cast<const C*>(f.d_lse)[at] : C(0));
    }
  }

  // Whether all keys that a row sees are in one tile.
  static bool sees_one_tile(const Span& seen) { return seen.end - seen.begin / kKeys * kKeys <= kKeys; }

  C dot_output(int64_t b, int64_t h, int64_t i) const {
    vec<C> sum = {};
    for (int64_t d = 0; d < s.Dv; d += W) {
      const int left = int(imin(W, s.Dv - d));
      sum = fma(load_upto(f.d_out.row<const S>(b, h, i) + d, left), load_upto(f.out.row<const S>(b, h, i) + d, left),
                sum);
    }
    return sum_lanes<C>(sum);
  }

  // do . o of row i of the query tile that begins at i0, summed in the order of do . v: the same bits where o is v.
  C product_with_output(const PerWorker& own, int64_t b, int64_t h, int64_t i0, int64_t i) const {
    const int64_t r0 = i / kStrip * kStrip;
    const Left<E> strip = Base::strip_of(f.d_out, own.d_out, b, h, i0, r0, imin(kStrip, s.Lq - i0 - r0), s.Dv);
    C products[kStrip * kKeys];
    this->pack_as_columns(f.out, b, h, i0 + i, 1, s.Dv, own.packed_d_out);
    Base::strip_scores({strip.data + (i - r0) * strip.row, 0, strip.step}, own.packed_d_out, 1, s.Dv, {0, 1}, products);
    return products[0];
  }

  // Computes drop(p), ds and dc/dx of rows [r0, r0 + count) of a query tile and the vectors of `part` of a key tile, to
  // strip_p and strip_ds [kStrip][kKeys].
  void score_gradients(const PerWorker& own, int64_t b, int64_t h, int64_t i0, int64_t r0, int64_t count, int64_t tile,
                       const Span& part, C* strip_p, C* strip_ds) const {
    const int64_t j0 = tile * kKeys, n = this->tile_keys(tile), at = slot(own, b, h / group, tile);
    const int64_t begin = part.begin / W * W;
    if (few)
      for (int64_t i = 0; i < count; ++i) {
        copy_operand(s.q.template row<const S>(b, h, i0 + r0 + i), s.D, own.few_q, Base::padded(s.D));
        for (int64_t v = begin; v < part.end; v += W)
          store(strip_p + i * kKeys + v, this->dot_products(s.k, b, h / group, j0 + v, j0 + n - 1, own.few_q));
      }
    else
      Base::strip_scores(Base::strip_of(s.q, own.q, b, h, i0, r0, count, s.D), packed_keys + at * key_slot, n, s.D,
                         part, strip_p);
    Base::strip_scores(Base::strip_of(f.d_out, own.d_out, b, h, i0, r0, count, s.Dv), packed_values + at * value_slot,
                       n, s.Dv, part, strip_ds);
    const vec<C> factor = splat<C>(this->factor);
    for (int64_t i = 0; i < count; ++i) {
      C *p = strip_p + i * kKeys, *ds = strip_ds + i * kKeys;
      this->finish_scores(b, h, i0 + r0 + i, j0 + begin, part.end - begin, p + begin,
                          own.d_softcap ? own.d_softcap + i * kKeys + begin : nullptr);
      const RowKey key = s.seed ? this->row_key(b, h, i0 + r0 + i) : RowKey(0, 0);
      const vec<C> m = splat<C>(own.m[r0 + i]), inverse_l = splat<C>(own.inverse_l[r0 + i]);
      C* const weights = s.seed ? own.weights : p;
      const auto weight_at = [&](int64_t v) {
        const vec<C> weight = Exponential<S>::of((load(p + v) - m) * factor) * inverse_l;
        if (s.seed) {
          const auto keep = keep_mask<C>(key, j0 + v, s.drop_below);
          store(weights + v, weight);
          store(ds + v, keep ? load(ds + v) * this->keep_scale : vec<C>{});
          store(p + v, keep ? weight * this->keep_scale : vec<C>{});
        } else {
          store(p + v, weight);
        }
        return weight;
      };
      C delta = own.delta[r0 + i];
      // A weight of zero hides NaN.
      const auto hidden = [](vec<C> weight, vec<C> product) { return weight == C(0) ? vec<C>{} : product; };
      if (!sees_one_tile(this->range(b, i0 + r0 + i))) {
        for (int64_t v = begin; v < part.end; v += W) {
          const vec<C> weight = weight_at(v);
          store(ds + v, hidden(weight, weight * (load(ds + v) - splat<C>(delta))));
        }
        continue;
      }
      // delta = sum_j p_j dp_j: do . o would carry the rounding of o, which matters in 16 bits.
      vec<C> sum = {};
      for (int64_t v = begin; v < part.end; v += W) {
        const vec<C> weight = weight_at(v);
        sum = fma(weight, load(ds + v), sum);
      }
      if (!nonfinite(delta + sum_lanes<C>(sum))) {
        delta += sum_lanes<C>(sum);
        for (int64_t v = begin; v < part.end; v += W)
          store(ds + v, load(weights + v) * (load(ds + v) - splat<C>(delta)));
        continue;
      }
      sum = vec<C>{};
      for (int64_t v = begin; v < part.end; v += W) {
        const vec<C> weight = load(weights + v);
        sum = fma(weight, hidden(weight, load(ds + v)), sum);
      }
      delta += sum_lanes<C>(sum);
      for (int64_t v = begin; v < part.end; v += W) {
        const vec<C> weight = load(weights + v);
        store(ds + v, hidden(weight, weight * (load(ds + v) - splat<C>(delta))));
      }
    }
  }

  // One key head: dk and dv, and dq of the query heads of its group.
  void key_head(const PerWorker& own, int64_t b, int64_t hk) const {
    if (!f.d_bias)
      for (int64_t tile = 0; tile < key_tiles; ++tile) pack(own, b, hk, tile);
    const int64_t ld_k = Base::padded(s.D), ld_v = Base::padded(s.Dv);
    for (int64_t tile = 0; tile < key_tiles; ++tile) own.begun[tile] = false;
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t i0 = 0; i0 < s.Lq; i0 += tile_rows) {
        const int64_t rows = imin(tile_rows, s.Lq - i0);
        const Span seen = this->range(b, i0, rows), tiles = this->tiles(seen);
        bool begun[kBackwardQueries / kStrip] = {};  // strips of dq that hold something
        if (!tiles.empty()) {
          load_queries(own, b, h, i0, rows);
          const bool q_nonfinite = this->pack_as_rows(s.q, b, h, i0, rows, s.D, own.finite, own.packed_q);
          const bool d_out_nonfinite =
              f.d_out.data && this->pack_as_rows(f.d_out, b, h, i0, rows, s.Dv, own.finite, own.packed_d_out);
          for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
            add_tile(own, b, h, i0, rows, tile, this->within(seen, tile), q_nonfinite, d_out_nonfinite, begun);
        }
        for (int64_t r0 = 0; r0 < rows; r0 += kStrip)
          if (!begun[r0 / kStrip]) __builtin_memset(own.dq + r0 * ld_k, 0, size_t(kStrip * ld_k) * sizeof(C));
        for (int64_t i = 0; i < rows; ++i)
          Base::write_row(own.dq + i * ld_k, s.D, this->scale, f.dq.row<S>(b, h, i0 + i));
      }
    for (int64_t tile = 0; tile < key_tiles; ++tile)
      if (!own.begun[tile]) clear_keys(own, tile);
    for (int64_t j = 0; j < s.Lk; ++j) {
      Base::write_row(own.dk + j * ld_k, s.D, this->scale, f.dk.row<S>(b, hk, j));
      Base::write_row(own.dv + j * ld_v, s.Dv, C(1), f.dv.row<S>(b, hk, j));
    }
  }

  void clear_keys(const PerWorker& own, int64_t tile) const {
    const int64_t ld_k = Base::padded(s.D), ld_v = Base::padded(s.Dv), j0 = tile * kKeys, n = this->tile_keys(tile);
    __builtin_memset(own.dk + j0 * ld_k, 0, size_t(n * ld_k) * sizeof(C));
    __builtin_memset(own.dv + j0 * ld_v, 0, size_t(n * ld_v) * sizeof(C));
  }

  // Interleaves two rows of weights, rounded to E, into [kKeys][2]: the transposed left operand of two neighbouring k.
  static void pair_rows(const C* even, const C* odd, int64_t begin, int64_t end, E* to) {
    if constexpr (!same<E, C>)
      for (int64_t v = begin; v < end; v += W) {
        E low[W], high[W];
        store_operand(low, load(even + v)), store_operand(high, load(odd + v));
        vu16half bits[2];
        __builtin_memcpy(&bits[0], low, sizeof low), __builtin_memcpy(&bits[1], high, sizeof high);
        const vu32 words = __builtin_convertvector(bits[0], vu32) | __builtin_convertvector(bits[1], vu32) << 16;
        __builtin_memcpy(to + 2 * v, &words, sizeof words);
      }
  }

  // Adds the products of a query tile and the keys `seen` of a key tile to dq, dk and dv. begun: strips of dq written.
  void add_tile(const PerWorker& own, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t tile, const Span& seen,
                bool q_nonfinite, bool d_out_nonfinite, bool* begun) const {
    const int64_t j0 = tile * kKeys, n = this->tile_keys(tile), at = slot(own, b, h / group, tile);
    const int64_t ld_k = Base::padded(s.D), ld_v = Base::padded(s.Dv);
    // Positions [first, last) of p and ds, whole strips and vectors of keys, are written: 0 where a row sees nothing.
    constexpr int64_t kWhole = 8 * kStrip;
    static_assert(kWhole % W == 0 && kKeys % kWhole == 0);
    const int64_t first = seen.begin / kWhole * kWhole, last = ceil_div(seen.end, kWhole) * kWhole;
    const auto clear = [&](C* row, int64_t from, int64_t to) {
      for (int64_t v = from; v < to; v += W) store(row + v, vec<C>{});
    };
    const Right<E> key_rows =
        Base::as_rows(s.k, b, h / group, j0, packed_rows + at * row_slot, keys_nonfinite[at], n, s.D);
    // The first product of a tile stores instead of adding where it reaches all of its keys. (Non-finite gradients are
    // added to dv before the product.)
    const bool begins = !own.begun[tile] && first == 0 && seen.end == n && f.d_out.data && !d_out_nonfinite;
    if (!own.begun[tile] && !begins) clear_keys(own, tile);
    own.begun[tile] = true;
    for (int64_t r0 = 0; r0 < rows; r0 += kStrip) {
      const int64_t count = imin(kStrip, rows - r0);
      C *p = own.p + (same<E, C> ? r0 * kKeys : 0), *ds = own.ds + (same<E, C> ? r0 * kKeys : 0);
      const Span part = this->within(this->range(b, i0 + r0, count), tile);
      const int64_t begin = part.empty() ? last : part.begin / W * W, end = part.empty() ? last : part.end;
      if (!part.empty()) score_gradients(own, b, h, i0, r0, count, tile, part, p, ds);
      for (int64_t i = 0; i < kStrip; ++i) {
        const int64_t until = i < count ? begin : last, from = ceil_div(end, W) * W;
        clear(p + i * kKeys, first, until), clear(ds + i * kKeys, first, until);
        clear(p + i * kKeys, from, last), clear(ds + i * kKeys, from, last);
      }
      if (own.d_softcap)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t v = i * kKeys + begin; v < i * kKeys + end; v += W) {
            const vec<C> d = load(ds + v);
            store(ds + v, d == C(0) ? vec<C>{} : d * load(own.d_softcap + v));
          }
      if constexpr (!same<E, C>)
        for (int64_t i = 0; i < kStrip; i += 2) {
          const int64_t to = (r0 + i) * kKeys;
          pair_rows(p + i * kKeys, p + (i + 1) * kKeys, first, last, own.p_pairs + to);
          pair_rows(ds + i * kKeys, ds + (i + 1) * kKeys, first, last, own.dx_pairs + to);
          for (int64_t r = i; r < i + 2; ++r)
            for (int64_t v = r * kKeys + begin; v < r * kKeys + end; v += W) store_operand(own.dx + v, load(ds + v));
        }
      const E* dx;
      if constexpr (same<E, C>)
        dx = ds;
      else
        dx = own.dx;
      if (!part.empty())
        multiply(begun[r0 / kStrip] ? Into::kAdd : Into::kStore, kStrip, Base::by_rows(dx, kKeys), key_rows, begin,
                 imin(key_rows.depth, ceil_div(end, kPair<E>) * kPair<E>), own.dq + r0 * ld_k, ld_k);
      begun[r0 / kStrip] |= !part.empty();
      if (d_out_nonfinite) add_nonfinite_gradients(own, b, h, i0 + r0, count, p, j0, {begin, end});
    }
    const Right<E> q_rows = Base::as_rows(s.q, b, h, i0, own.packed_q, q_nonfinite, rows, s.D);
    const Right<E> d_out_rows = Base::as_rows(f.d_out, b, h, i0, own.packed_d_out, d_out_nonfinite, rows, s.Dv);
    Left<E> dx, p;
    if constexpr (same<E, C>)
      dx = {own.ds + first, 1, kKeys}, p = {own.p + first, 1, kKeys};
    else
      dx = {own.dx_pairs + 2 * first, 2, 2 * kKeys}, p = {own.p_pairs + 2 * first, 2, 2 * kKeys};
    const Into into = begins ? Into::kStore : Into::kAdd;
    multiply(into, seen.end - first, dx, q_rows, 0, q_rows.depth, own.dk + (j0 + first) * ld_k, ld_k);
    if (f.d_out.data)
      multiply(into, seen.end - first, p, d_out_rows, 0, d_out_rows.depth, own.dv + (j0 + first) * ld_v, ld_v);
  }

  // Adds NaN and infinity among do, packed as zero, to dv of the keys that their queries see.
  void add_nonfinite_gradients(const PerWorker& own, int64_t b, int64_t h, int64_t i0, int64_t count, const C* p,
                               int64_t j0, const Span& part) const {
    const int64_t ld = Base::padded(s.Dv);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < s.Dv; ++d) {
        const C x = load_one(f.d_out.row<const S>(b, h, i0 + i) + d);
        if (!nonfinite(x)) continue;
        for (int64_t j = part.begin; j < part.end; ++j)
          if (p[i * kKeys + j] != C(0)) own.dv[(j0 + j) * ld + d] += p[i * kKeys + j] * x;
      }
  }

  void bias_gradient(const PerWorker& own, int64_t bias_b, int64_t bias_h, int64_t bias_tile) const;

  void run(Worker& worker) const {
    const PerWorker& own = per_worker[worker.index()];
    if (f.d_bias)
      worker.phase(s.B * s.Hk * key_tiles, false, [&](int64_t item) {
        pack(own, item / key_tiles / s.Hk, item / key_tiles % s.Hk, item % key_tiles);
      });
    worker.phase(s.B * s.Hk, false, [&](int64_t item) { key_head(own, item / s.Hk, item % s.Hk); });
    if (!f.d_bias) return;
    const int64_t tiles = f.d_bias_shape[2] == 1 ? 1 : query_tiles;
    worker.phase(f.d_bias_shape[0] * f.d_bias_shape[1] * tiles, false, [&](int64_t item) {
      bias_gradient(own, item / tiles / f.d_bias_shape[1], item / tiles % f.d_bias_shape[1], item % tiles);
    });
  }
};

template <class S>
static void attention_backward(const AttentionBackward& f, const Parallel& parallel, const Scratch& scratch) {
  const AttentionBackwardPass<S> pass(f, parallel, scratch);
  run_region(parallel, pass.workers, [&](Worker& worker) { pass.run(worker); });
}
