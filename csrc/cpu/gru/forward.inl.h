// The forward pass of a sequence.

template <class S>
struct ForwardSequence : Forward<S> {
  using Forward<S>::f;
  using Forward<S>::s;
  using Forward<S>::blocks;
  using C = compute_t<S>;
  using E = operand_t<S>;
  static constexpr int W = lanes<C>;

  Sharing sharing;
  Steps steps;
  int64_t chunk_steps;
  LayerWeights<S> weights;
  int64_t depth;       // I padded to what a product takes
  bool copies;         // input rows are copied: their type or their length is not what a product takes
  const S** input[2];  // [N] input rows in the order of the recurrence
  C* gi[2];            // [tokens of a chunk][blocks][r z n][W]
  C* h[2][2];          // the state before and after a step, [B][blocks * W]
  E* operand[2][2];    // the same as operands of the product
  E* copied[2];        // [tokens of a chunk][depth]

  ForwardSequence(const GruForward& forward, const Parallel& parallel, const Scratch& scratch)
      : Forward<S>(forward),
        sharing(parallel, s, 6.0 * s.D * s.N * s.H * (s.I + s.H), 3 * s.H * s.H * int64_t(sizeof(E)),
                3 * s.D * s.H * (s.H + s.I) * int64_t(sizeof(E))),
        steps(s, take<int64_t>(scratch, s.T + 1)),
        chunk_steps(steps_per_chunk(s, 3 * blocks * W * int64_t(sizeof(C)))),
        weights(s, blocks, chunk_steps >= s.T, sharing.workers, scratch),
        depth(padded_depth<E>(s.I)),
        copies(!same<S, E> || depth != s.I) {
    for (int d = 0; d < s.D; ++d) {
      input[d] = take<const S*>(scratch, s.N);
      gi[d] = take<C>(scratch, chunk_steps * s.B * 3 * blocks * W);
      for (int i = 0; i < 2; ++i) {
        h[d][i] = take<C>(scratch, s.B * blocks * W);
        if constexpr (same<C, E>)
          operand[d][i] = h[d][i];
        else
          operand[d][i] = take<E>(scratch, s.B * blocks * W);
      }
      if (copies) copied[d] = take<E>(scratch, chunk_steps * s.B * depth);
    }
  }

  void prepare(int d) const {
    for (int64_t step = 0, i = 0; step < s.T; ++step) {
      const int64_t t = steps.time(d, step), rows = steps.rows(d, step);
      for (int64_t b = 0; b < rows; ++b) input[d][i++] = input_row<S>(s, t, b, steps.offset[t] + b);
    }
    // Both buffers: a row that joins late (second direction, packed) finds its initial state in either.
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t j = 0; j < blocks; ++j) {
        const int left = int(imin(W, s.H - j * W));
        const vec<C> h0 = load_upto(static_cast<const S*>(s.h0) + (d * s.B + b) * s.H + j * W, left);
        for (int i = 0; i < 2; ++i) put_state(d, i, (b * blocks + j) * W, h0);
      }
  }

  FASTGRU_METHOD void put_state(int d, int which, int64_t at, vec<C> value) const {
    store(h[d][which] + at, value);
    if constexpr (!same<C, E>) store(operand[d][which] + at, value);
  }

  // gi for the blocks [j0, j1) of `tokens` tokens, the first of them at position `begin`.
  void project(int worker, int d, int64_t begin, int64_t tokens, int64_t j0, int64_t j1) const {
    weights.project(
        worker, d, tokens,
        [&](int64_t i) {
          if constexpr (same<S, E>)
            if (!copies) return input[d][begin + i];
          return static_cast<const E*>(copied[d] + i * depth);
        },
        j0, j1, [&](int64_t i, int64_t j) { return gi[d] + (i * blocks + j) * 3 * W; });
  }

  // One step of rows [b0, b1) and blocks [j0, j1); its row 0 is token `base` of the chunk.
  void step(int d, int64_t step, int64_t base, int64_t b0, int64_t b1, int64_t j0, int64_t j1) const {
    const int64_t stride = blocks * W, token = steps.token(d, step), rows_next = steps.rows(d, step + 1);
    const bool ends = step + 1 == s.T, shrinks = d == 0 && s.batch_sizes;
    const C* from = h[d][step & 1];
    const E* rows = operand[d][step & 1];
    const auto gi_of = [&](int64_t b, int64_t j) { return gi[d] + ((base + b) * blocks + j) * 3 * W; };
    panel_product<E>(
        b1 - b0, [&](int, int64_t i) { return rows + (b0 + i) * stride; }, 1, &weights.w_hh[d], j0, j1,
        [&](int64_t i0, int count, int64_t j, int, C* tile) {
          const vec<C> bias_q = load(weights.biases[d] + (j * 4 + 3) * W);
          for (int i = 0; i < count; ++i) reset_and_update<C>(gi_of(b0 + i0 + i, j), tile + i * 3 * W);
          for (int i = 0; i < count; ++i) {
            const int64_t b = b0 + i0 + i;
            const Gates<C> g = gru_gates<C>(gi_of(b, j), tile + i * 3 * W, bias_q, load(from + b * stride + j * W));
            // No NaN in units that do not exist: the product may take one of them along, with a weight of zero.
            put_state(d, (step + 1) & 1, b * stride + j * W, (j + 1) * W > s.H ? keep<C>(g.h, int(s.H - j * W)) : g.h);
            this->finish(d, token + b, b, j, g, ends || (shrinks && b >= rows_next));
          }
        });
  }

  void run(Worker& worker) const {
    const PanelItems inputs(sharing.workers, blocks, chunk_steps * s.B, 3 * W * s.I);
    const PanelItems states(sharing.workers, blocks, s.B, 3 * W * s.H);
    worker.phase(s.D * (blocks + 1), false, [&](int64_t i) {
      const int d = int(i % s.D);
      if (i / s.D == 0)
        prepare(d);
      else
        weights.pack(d, i / s.D - 1);
    });
    for (int64_t begin = 0; begin < s.T; begin += chunk_steps) {
      const int64_t end = imin(s.T, begin + chunk_steps);
      const auto tokens = [&](int d) { return steps.position(d, end) - steps.position(d, begin); };
      if (copies) {
        const int64_t rows = imax(tokens(0), tokens(s.D - 1)), part = 16;
        worker.phase(s.D * ceil_div(rows, part), false, [&](int64_t item) {
          const int d = int(item % s.D);
          const int64_t last = imin(tokens(d), (item / s.D + 1) * part);
          for (int64_t i = item / s.D * part; i < last; ++i)
            copy_operand(input[d][steps.position(d, begin) + i], s.I, copied[d] + i * depth, depth);
        });
      }
      worker.phase(s.D * inputs.count, false, [&](int64_t item) {
        const int d = int(item / inputs.count);
        const int64_t i = item % inputs.count;
        project(worker.index(), d, steps.position(d, begin), tokens(d), inputs.begin(i), inputs.end(i));
      });
      if (sharing.batch_slices) {
        worker.phase(s.D * sharing.batch_slices, false, [&](int64_t item) {
          const int d = int(item / sharing.batch_slices);
          const int64_t slice = item % sharing.batch_slices;
          const int64_t b0 = s.B * slice / sharing.batch_slices, b1 = s.B * (slice + 1) / sharing.batch_slices;
          for (int64_t t = begin; t < end; ++t)
            step(d, t, steps.position(d, t) - steps.position(d, begin), b0, imin(b1, steps.rows(d, t)), 0, blocks);
        });
      } else {
        for (int64_t t = begin; t < end; ++t)
          worker.phase(s.D * states.count, t & 1, [&](int64_t item) {
            const int d = int(item / states.count);
            const int64_t i = item % states.count;
            step(d, t, steps.position(d, t) - steps.position(d, begin), 0, steps.rows(d, t), states.begin(i),
                 states.end(i));
          });
      }
    }
  }
};
