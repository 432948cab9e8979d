// The forward pass of a single step. Packing would not be used again, so gates come from dot products along the rows of
// the weights as they lie in memory.

template <class S>
struct ForwardStep : Forward<S> {
  using Forward<S>::s;
  using Forward<S>::blocks;
  using C = compute_t<S>;
  static constexpr int W = lanes<C>;
  static constexpr int kBatch = 32;  // rows whose products are held at once

  const C* state;  // [D, B, H] in the compute type
  const C* input;  // [B, I] likewise, rows input_stride apart
  int64_t input_stride;
  int workers;
  // Every other call of a thread reads the weights from their end: a stream of steps then begins with what it read
  // last, while the nearer caches still hold it.
  bool reversed;

  ForwardStep(const GruForward& forward, const Parallel& parallel, const Scratch& scratch) : Forward<S>(forward) {
    static thread_local bool turn = false;
    reversed = turn = !turn;
    const int64_t weights = 3 * s.D * s.H * (s.H + s.I);
    workers = worth_workers(parallel, 2.0 * double(s.B) * double(weights), double(weights) * sizeof(S));
    if constexpr (same<S, C>) {
      state = static_cast<const C*>(s.h0);
      input = static_cast<const C*>(s.x);
      input_stride = s.x_stride_b;
    } else {
      C* h = take<C>(scratch, s.D * s.B * s.H);
      C* x = take<C>(scratch, s.B * s.I);
      for (int64_t row = 0; row < s.D * s.B; ++row)
        copy_operand(static_cast<const S*>(s.h0) + row * s.H, s.H, h + row * s.H, s.H);
      for (int64_t b = 0; b < s.B; ++b) copy_operand(input_row<S>(s, 0, b, b), s.I, x + b * s.I, s.I);
      state = h;
      input = x;
      input_stride = s.I;
    }
  }

  void block(int d, int64_t j) const {
    alignas(64) C bias[4 * W], gi[kBatch * 3 * W], gh[kBatch * 3 * W];
    load_biases<C, S>(s.w[d], s.H, j, bias);
    const int left = int(imin(W, s.H - j * W));
    for (int64_t b0 = 0; b0 < s.B; b0 += kBatch) {
      const int count = int(imin(kBatch, s.B - b0));
      const C *x[kBatch], *h[kBatch];
      for (int i = 0; i < count; ++i) {
        x[i] = input + (b0 + i) * input_stride;
        h[i] = state + (d * s.B + b0 + i) * s.H;
      }
      dot_block<C, S>(s.I, s.H, static_cast<const S*>(s.w[d].w_ih), j, x, count, gi);
      dot_block<C, S>(s.H, s.H, static_cast<const S*>(s.w[d].w_hh), j, h, count, gh);
      for (int i = 0; i < count; ++i) {
        C* row = gi + i * 3 * W;
        for (int g = 0; g < 3; ++g) store(row + g * W, load(row + g * W) + load(bias + g * W));
        reset_and_update<C>(row, gh + i * 3 * W);
        const Gates<C> g = gru_gates<C>(row, gh + i * 3 * W, load(bias + 3 * W), load_upto(h[i] + j * W, left));
        this->finish(d, b0 + i, b0 + i, j, g, true);
      }
    }
  }

  void run(Worker& worker) const {
    worker.phase(s.D * blocks, reversed, [&](int64_t i) { block(int(i / blocks), i % blocks); });
  }
};
