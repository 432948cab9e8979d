// The backward pass of few_units.inl.h.

template <class S>
struct FewUnitsBackward : FewUnits<S> {
  using Base = FewUnits<S>;
  using Base::s;
  using Base::steps;
  using typename Base::C;
  static constexpr int W = lanes<C>;

  const GruBackward& f;
  // Of a worker, for the blocks of a tile: gate gradients [n r z q][unit], inputs [I], states before the step [unit].
  int64_t slot, memory_size;
  C* memory;
  // Weight gradients: of an item, [sums][W] in a worker's memory, and summed over its lanes, [item][d][sums].
  int64_t sums;  // rows n r z of dw_ih, rows r z q of dw_hh, then the biases n r z q
  C* partial;

  FewUnitsBackward(const GruBackward& backward, const Parallel& parallel, const Scratch& scratch)
      : Base(backward.s, parallel, scratch, 6.0 * double(backward.s.H * (2 * backward.s.H + 2 * backward.s.I))),
        f(backward),
        slot((5 * s.H + s.I) * W),
        sums(f.dw_ih ? ceil_div(3 * s.H * (s.I + s.H) + 4 * s.H, W) * W : 0) {
    if (!f.gates) this->take_across(scratch);
    this->take_along(scratch);
    memory_size = kTileBlocks * slot + sums * W;
    memory = take<C>(scratch, this->workers * memory_size);
    partial = take<C>(scratch, this->items * s.D * sums);
  }

  // The state before a step.
  void load_previous(int d, int64_t step, int64_t block, int live, C* out) const {
    const int from_y = imin(live, this->live(block, steps.rows(d, step - 1)));
    if (from_y)
      load_columns(static_cast<const S*>(f.y) + (steps.token(d, step - 1) + block * W) * s.D * s.H + d * s.H, s.D * s.H,
                   from_y, s.H, out);
    if (from_y == live) return;
    alignas(64) C h0[kFewUnits * W];
    load_columns(static_cast<const S*>(s.h0) + (d * s.B + block * W) * s.H, s.H, live, s.H, h0);
    for (int64_t u = 0; u < s.H; ++u)
      store(out + u * W, from_y ? first_lanes<C>(from_y, load(out + u * W), load(h0 + u * W)) : load(h0 + u * W));
  }

  // Computes one step of a block: dL/dh before it from dL/dh after it, and the gate gradients `da`.
  FASTGRU_METHOD void step(int d, int64_t step, int64_t block, int live, C* dh, C* da, C* x, C* h) const {
    alignas(64) C r[kFewUnits * W], z[kFewUnits * W], n[kFewUnits * W], q[kFewUnits * W], dy[kFewUnits * W];
    alignas(64) C carry[kFewUnits * W], next[kFewUnits * W];
    const int64_t rows = steps.rows(d, step), token = steps.token(d, step) + block * W, H = s.H;
    if (f.dw_ih || !f.gates) this->load_input(d, step, block, live, x);
    load_previous(d, step, block, live, h);
    if (f.dy) load_columns(static_cast<const S*>(f.dy) + token * s.D * H + d * H, s.D * H, live, H, dy);
    if (f.gates) {
      const S* saved = this->saved(static_cast<const S*>(f.gates), d, step, block);
      for (int64_t u = 0; u < H; ++u) {
        store(r + u * W, load_upto(saved + u * rows, live));
        store(z + u * W, load_upto(saved + (H + u) * rows, live));
        store(n + u * W, load_upto(saved + (2 * H + u) * rows, live));
        store(q + u * W, load_upto(saved + (3 * H + u) * rows, live));
      }
    } else {
      alignas(64) C gi[kFewUnits * 3 * W], gh[kFewUnits * 3 * W];
      this->gates(d, x, h, false, gi, gh, [&](int64_t u, const Gates<C>& g) {
        store(r + u * W, keep<C>(g.r, live));
        store(z + u * W, keep<C>(g.z, live));
        store(n + u * W, keep<C>(g.n, live));
        store(q + u * W, keep<C>(g.q, live));
      });
    }
    for (int64_t u = 0; u < H; ++u) {
      const auto of = [&](const C* p) { return load(p + u * W); };
      vec<C> g = of(dh);
      if (f.dy) g = g + of(dy);
      if (live < W) g = keep<C>(g, live);
      const vec<C> da_n = g * (C(1) - of(z)) * (C(1) - of(n) * of(n));
      store(da + u * W, da_n);
      store(da + (H + u) * W, da_n * of(q) * of(r) * (C(1) - of(r)));
      store(da + (2 * H + u) * W, g * (of(h) - of(n)) * of(z) * (C(1) - of(z)));
      store(da + (3 * H + u) * W, da_n * of(r));
      store(carry + u * W, g * of(z));
    }
    lane_product(3 * H, da + H * W, this->w_hh[d], H, next);
    for (int64_t u = 0; u < H; ++u) {
      const vec<C> before = load(next + u * W) + load(carry + u * W);
      store(dh + u * W, live < W ? first_lanes<C>(live, before, load(dh + u * W)) : before);
    }
    if (f.dx) input_gradient(d, token, live, da);
  }

  void input_gradient(int d, int64_t token, int live, const C* da) const {
    alignas(64) C sum[kFewInputs * W], part[kFewInputs * W];
    S* to = static_cast<S*>(f.dx) + token * s.I;
    lane_product(s.H, da, this->w_ih[d] + 2 * s.H * s.I, s.I, sum);
    lane_product(2 * s.H, da + s.H * W, this->w_ih[d], s.I, part);
    for (int64_t i = 0; i < s.I; ++i) store(sum + i * W, load(sum + i * W) + load(part + i * W));
    if (d == 1) {
      load_columns(to, s.I, live, s.I, part);
      for (int64_t i = 0; i < s.I; ++i) store(sum + i * W, load(part + i * W) + load(sum + i * W));
    }
    store_columns(to, s.I, live, s.I, sum);
  }

  // Adds the part of `count` blocks of a tile in one step to the weight gradients.
  void add_weights(int count, const C* da, const C* x, const C* h, C* total) const {
    const int64_t H = s.H, block_da = 4 * H * W, block_x = s.I * W, block_h = H * W;
    const auto add = [&](const C* rows, const C* b, int64_t block_b, int64_t columns, C* to) {
      using Table = OuterTable<C>;
      for (int64_t m = 0; m < 3 * H; m += Table::M)
        for (int64_t n = 0; n < columns; n += Table::N)
          Table::kernels[imin(Table::N, columns - n) - 1](count, rows + m * W, block_da, b + n * W, block_b,
                                                          to + (m * columns + n) * W, columns);
    };
    add(da, x, block_x, s.I, total);
    add(da + H * W, h, block_h, H, total + 3 * H * s.I * W);
    C* biases = total + 3 * H * (s.I + H) * W;
    for (int64_t m = 0; m < 4 * H; ++m) {
      vec<C> sum = load(da + m * W);
      for (int i = 1; i < count; ++i) sum = sum + load(da + i * block_da + m * W);
      store(biases + m * W, load(biases + m * W) + sum);
    }
  }

  void tile(int d, int64_t first, int64_t end, C* own) const {
    alignas(64) C dh[kTileBlocks * kFewUnits * W];
    C *da = own, *x = da + kTileBlocks * 4 * s.H * W, *h = x + kTileBlocks * s.I * W, *total = own + kTileBlocks * slot;
    const auto dh_of = [&](int64_t block) { return dh + (block - first) * s.H * W; };
    for (int64_t block = first; block < end; ++block) {
      const int64_t at = (d * s.B + block * W) * s.H;
      if (f.dh_n)
        load_columns(static_cast<const S*>(f.dh_n) + at, s.H, this->live(block, s.B), s.H, dh_of(block));
      else
        for (int64_t u = 0; u < s.H; ++u) store(dh_of(block) + u * W, vec<C>{});
    }
    for (int64_t t = s.T - 1; t >= 0; --t) {
      const int64_t rows = steps.rows(d, t);
      int count = 0;
      for (int64_t block = first; block < end; ++block, ++count) {
        const int live = this->live(block, rows);
        if (!live) break;
        step(d, t, block, live, dh_of(block), da + count * 4 * s.H * W, x + count * s.I * W, h + count * s.H * W);
      }
      if (f.dw_ih && count) add_weights(count, da, x, h, total);
    }
    for (int64_t block = first; block < end; ++block)
      store_columns(static_cast<S*>(f.dh0) + (d * s.B + block * W) * s.H, s.H, this->live(block, s.B), s.H,
                    dh_of(block));
  }

  void sum_lanes(const C* total, C* out) const {
    for (int64_t i = 0; i < sums; i += W) {
      vec<C> rows[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) rows[l] = load(total + (i + l) * W);
      sum_neighbours<C, 1>(rows);
      store(out + i, rows[0]);
    }
  }

  // The gradients of one direction's weights, from the sums of the items.
  void write_weights(int d) const {
    C* total = partial + d * sums;
    for (int64_t item = 1; item < this->items; ++item)
      for (int64_t i = 0; i < sums; i += W)
        store(total + i, load(total + i) + load(partial + (item * s.D + d) * sums + i));
    const int64_t H = s.H;
    const auto copy = [](const C* from, int64_t n, S* to) {
      for (int64_t i = 0; i < n; i += W) {
        const int left = int(imin(W, n - i));
        store_upto(to + i, load_upto(from + i, left), left);
      }
    };
    S *dw_ih = static_cast<S*>(f.dw_ih) + d * 3 * H * s.I, *dw_hh = static_cast<S*>(f.dw_hh) + d * 3 * H * H;
    S *db_ih = static_cast<S*>(f.db_ih) + d * 3 * H, *db_hh = static_cast<S*>(f.db_hh) + d * 3 * H;
    // Here n r z, there r z n.
    copy(total, H * s.I, dw_ih + 2 * H * s.I);
    copy(total + H * s.I, 2 * H * s.I, dw_ih);
    total += 3 * H * s.I;
    copy(total, 3 * H * H, dw_hh);
    total += 3 * H * H;
    copy(total, H, db_ih + 2 * H);
    copy(total + H, 2 * H, db_ih);
    copy(total + H, 3 * H, db_hh);
  }

  void run(Worker& worker) const {
    worker.phase(this->items, false, [&](int64_t item) {
      C* own = memory + worker.index() * memory_size;
      // One direction after the other: the second adds to dx.
      for (int d = 0; d < s.D; ++d) {
        __builtin_memset(own + kTileBlocks * slot, 0, size_t(sums * W) * sizeof(C));
        this->each_tile(item, [&](int64_t first, int64_t end) { tile(d, first, end, own); });
        sum_lanes(own + kTileBlocks * slot, partial + (item * s.D + d) * sums);
      }
    });
    if (f.dw_ih) worker.phase(s.D, false, [&](int64_t d) { write_weights(int(d)); });
  }
};

template <class S>
static void few_units_backward(const GruBackward& b, const Parallel& parallel, const Scratch& scratch) {
  const FewUnitsBackward<S> backward(b, parallel, scratch);
  run_region(parallel, backward.workers, [&](Worker& worker) { backward.run(worker); });
}
