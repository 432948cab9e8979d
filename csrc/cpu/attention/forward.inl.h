// Forward pass of attention on the CPU; equations in types.h. Included after attention/online_softmax.inl.h.
//
// Key heads go in rounds, each of two phases:
//   1. pack: keys as columns and values as rows of right operands, one item for each tile of keys;
//   2. compute: one item for each tile of queries, which walks over the key tiles that any of its rows sees, a strip of
//      kStrip rows at a time: scores, weights, then o += p v.
// Few queries are not packed: see few_queries.inl.h.
// The order of additions of a row depends neither on its tile nor on the number of threads: results are bitwise equal.

// A round holds key heads up to this many bytes of packed keys and values, 2 MiB, or enough for so many items a worker.
constexpr int64_t kRoundBytes = int64_t(1) << 21, kRoundItems = 32;

// Workers for a pass. It has a few barriers only, so a third of a recurrence's work pays for a thread.
static int worth_threads(const Parallel& parallel, double flops, double bytes) {
  return worth_workers(parallel, 3 * flops, 3 * bytes);
}

template <class S>
struct AttentionForwardPass : OnlineSoftmax<S> {
  using Base = OnlineSoftmax<S>;
  using Base::f;
  using Base::few;
  using Base::finish_row;
  using Base::fused_exp;
  using Base::fused_weights;
  using Base::group;
  using Base::key_tiles;
  using Base::kKeys;
  using Base::query_tiles;
  using Base::s;
  using Base::sees_one;
  using Base::shift;
  using Base::slack;
  using Base::tile_rows;
  using Base::update_maxima;
  using Base::W;
  using Base::weights;
  using typename Base::C;
  using typename Base::E;
  using typename Base::SoftmaxState;

  struct PerWorker {
    E* q;       // [kForwardQueries][padded D]
    C* x;       // [kStrip][kKeys] scores; few queries: [padded Lk]
    E* p;       // [kStrip][kKeys] weights, before division by their sum
    C* out;     // [kForwardQueries][padded Dv]; few queries: [padded Dv]
    S* finite;  // [kKeys][Dv]
    C* few_q;   // [padded D], few queries only
  };

  int workers;
  int64_t round;  // key heads of a round
  int64_t key_slot, value_slot;
  E *packed_keys, *packed_values;  // [round][key_tiles][slot]
  bool* values_nonfinite;          // [round][key_tiles]
  PerWorker per_worker[kMaxWorkers];

  AttentionForwardPass(const AttentionForward& forward, const Parallel& parallel, const Scratch& scratch)
      : Base(forward),
        workers(worth_threads(parallel, 2.0 * s.B * s.Hq * s.Lq * s.Lk * (s.D + s.Dv),
                              double(s.B * s.Hk * s.Lk * (s.D + s.Dv) * int64_t(sizeof(S))))),
        key_slot(panels_size<E>(s.D, imin(kKeys, s.Lk))),
        value_slot(panels_size<E>(imin(kKeys, s.Lk), s.Dv)) {
    // At least four items for each worker.
    if (workers > 1) this->set_tile_rows(imin(tile_rows, s.B * s.Hq * s.Lq / (4 * workers)));
    // Packed heads stay in cache; enough items let all workers end at about the same time.
    const int64_t head_bytes = key_tiles * (key_slot + value_slot) * int64_t(sizeof(E));
    round = imin(s.B * s.Hk, imax(kRoundBytes / imax(1, head_bytes),
                                  ceil_div(kRoundItems * workers, imax(1, group * query_tiles))));
    const int64_t slots = few ? 0 : round * key_tiles;
    packed_keys = take<E>(scratch, slots * key_slot + W * kPair<E>);  // fused_weights() may read one vector beyond
    packed_values = take<E>(scratch, slots * value_slot);
    values_nonfinite = take<bool>(scratch, slots);
    for (int w = 0; w < workers; ++w) {
      PerWorker& own = per_worker[w];
      own.x = take<C>(scratch, few ? Base::padded(s.Lk) : kStrip * kKeys);
      own.out = take<C>(scratch, (few ? 1 : kForwardQueries) * Base::padded(s.Dv));
      if (few) {
        own.few_q = take<C>(scratch, Base::padded(s.D));
        continue;
      }
      own.q = take<E>(scratch, kForwardQueries * padded_depth<E>(s.D));
      own.p = take<E>(scratch, kStrip * kKeys);
      own.finite = take<S>(scratch, kKeys * s.Dv);
    }
  }

  void pack(const PerWorker& own, int64_t head, int64_t tile, int64_t slot) const {
    const int64_t h = head % s.Hk, b = head / s.Hk;
    if (tile * kKeys >= this->keys(b)) return;
    const int64_t n = this->tile_keys(tile);
    this->pack_as_columns(s.k, b, h, tile * kKeys, n, s.D, packed_keys + slot * key_slot);
    values_nonfinite[slot] =
        this->pack_as_rows(s.v, b, h, tile * kKeys, n, s.Dv, own.finite, packed_values + slot * value_slot);
  }

  // One query tile of head `head` of B * Hq; its key head is packed in the slots from `slots` on.
  void query_tile(const PerWorker& own, int64_t head, int64_t query_tile, int64_t slots) const {
    const int64_t i0 = query_tile * tile_rows, h = head % s.Hq, b = head / s.Hq;
    const int64_t rows = imin(tile_rows, s.Lq - i0), ld = Base::padded(s.Dv);
    SoftmaxState state;
    for (int64_t i = 0; i < kForwardQueries + W; ++i)
      // Rows that pad the last strip never update m.
      state.m[i] = i < rows ? -C(__builtin_inf()) : C(0), state.limit[i] = i < rows ? slack : C(__builtin_inf());
    for (int64_t i = 0; i < rows; ++i) state.l[i] = vec<C>{};
    for (int64_t r0 = 0; r0 < rows; r0 += kStrip) state.begun[r0 / kStrip] = false;
    this->copy_rows(s.q, b, h, i0, rows, s.D, own.q);
    const Span tiles = this->tiles(this->range(b, i0, rows));
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      for (int64_t r0 = 0; r0 < rows; r0 += kStrip)
        strip(own, state, b, h, i0, r0, imin(kStrip, rows - r0), tile, slots + tile);
    for (int64_t r0 = 0; r0 < rows; r0 += kStrip)
      if (!state.begun[r0 / kStrip]) __builtin_memset(own.out + r0 * ld, 0, size_t(kStrip * ld) * sizeof(C));
    for (int64_t i = 0; i < rows; ++i) {
      finish_row(b, h, i0 + i, own.out + i * ld, shift(state.m[i]), sum_lanes<C>(state.l[i]));
    }
  }

  // Adds one tile of keys to rows [r0, r0 + count) of the query tile that begins at i0.
  void strip(const PerWorker& own, SoftmaxState& state, int64_t b, int64_t h, int64_t i0, int64_t r0, int64_t count,
             int64_t tile, int64_t slot) const {
    const Span part = this->within(this->range(b, i0 + r0, count), tile);
    if (part.empty()) return;
    const int64_t j0 = tile * kKeys, n = this->tile_keys(tile);
    const int64_t ld = Base::padded(s.Dv), begin = part.begin / W * W;
    const Left<E> q = Base::strip_of(s.q, own.q, b, h, i0, r0, count, s.D);
    const Right<E> values =
        Base::as_rows(s.v, b, h / group, j0, packed_values + slot * value_slot, values_nonfinite[slot], n, s.Dv);
    C* out = own.out + r0 * ld;
    C decay[kStrip + W];
    // Depth of the product p v, in whole vectors and pairs.
    int64_t k0 = 0, k1 = values.depth;
    bool decays = false;
    if (!(fused_exp && sees_all(b, i0 + r0, count, j0, n) &&
          fused_weights(own.p, state, q, packed_keys + slot * key_slot, r0, n))) {
      Base::strip_scores(q, packed_keys + slot * key_slot, n, s.D, part, own.x);
      C highest[kStrip + W];
      for (int64_t i = 0; i < kStrip + W; ++i) highest[i] = -C(__builtin_inf());
      for (int64_t i = 0; i < count; ++i) {
        C* x = own.x + i * kKeys + begin;
        highest[i] = this->finish_scores(b, h, i0 + r0 + i, j0 + begin, part.end - begin, x, nullptr);
        if (state.m[r0 + i] == -C(__builtin_inf()) && sees_one(x, part.end - begin))
          state.limit[r0 + i] = -C(__builtin_inf());
      }
      update_maxima(state, r0, highest, decay);
      decays = true;
      k0 = part.begin / 64 * 64, k1 = ceil_div(part.end, kPair<E>) * kPair<E>;
      for (int64_t i = 0; i < count; ++i) {
        E* p = own.p + i * kKeys;
        for (int64_t k = k0; k < begin; k += W) store(p + k, vec<C>{});
        const vec<C> sum = weights(b, h, i0 + r0 + i, j0 + begin, part.end - begin, own.x + i * kKeys + begin,
                                   shift(state.m[r0 + i]), p + begin);
        state.l[r0 + i] = fma(state.l[r0 + i], splat<C>(decay[i]), sum);
      }
    }
    bool& begun = state.begun[r0 / kStrip];
    multiply(!begun   ? Into::kStore
             : decays ? Into::kDecay
                      : Into::kAdd,
             kStrip, Base::by_rows(own.p, kKeys), values, k0, k1, out, ld, decay);
    begun = true;
    if (values_nonfinite[slot]) add_nonfinite_values(own, b, h / group, j0, {begin, part.end}, count, out, ld);
  }

  // Whether all rows [i, i + count) see all keys [j0, j0 + n). Both ends of a range grow with i, and rows beyond the
  // sequence, which see nothing, come last: so the first and the last row tell.
  bool sees_all(int64_t b, int64_t i, int64_t count, int64_t j0, int64_t n) const {
    const Span first = this->range(b, i), last = this->range(b, i + count - 1);
    return imax(first.begin, last.begin) <= j0 && imin(first.end, last.end) >= j0 + n;
  }

  // Adds NaN and infinity among the values, packed as zero, to the outputs of the queries that see them.
  void add_nonfinite_values(const PerWorker& own, int64_t b, int64_t hk, int64_t j0, const Span& part, int64_t count,
                            C* out, int64_t ld) const {
    for (int64_t j = part.begin; j < part.end; ++j)
      for (int64_t d = 0; d < s.Dv; ++d) {
        const C x = load_one(s.v.template row<const S>(b, hk, j0 + j) + d);
        if (!nonfinite(x)) continue;
        for (int64_t i = 0; i < count; ++i) {
          const C p = load_one(own.p + i * kKeys + j);
          if (p != C(0)) out[i * ld + d] += p * x;
        }
      }
  }

  template <int V>
  static void weighted_sum(const C* x, int64_t n, const S* v, int64_t ld, int64_t left, C* out);
  void few_queries(const PerWorker& own, int64_t b, int64_t h) const;

  void run(Worker& worker) const {
    const PerWorker& own = per_worker[worker.index()];
    if (few) return worker.phase(s.B * s.Hq, false, [&](int64_t item) { few_queries(own, item / s.Hq, item % s.Hq); });
    for (int64_t first = 0; first < s.B * s.Hk; first += round) {
      const int64_t heads = imin(round, s.B * s.Hk - first), tiles = group * query_tiles;
      worker.phase(heads * key_tiles, false,
                   [&](int64_t slot) { pack(own, first + slot / key_tiles, slot % key_tiles, slot); });
      worker.phase(heads * tiles, false, [&](int64_t item) {
        query_tile(own, first * group + item / query_tiles, item % query_tiles, item / tiles * key_tiles);
      });
    }
  }
};

template <class S>
static void attention_forward(const AttentionForward& f, const Parallel& parallel, const Scratch& scratch) {
  const AttentionForwardPass<S> pass(f, parallel, scratch);
  run_region(parallel, pass.workers, [&](Worker& worker) { pass.run(worker); });
}
