// The plan of a call: where the tokens of each step lie, and how steps and products are shared out.
//
// Forward, in one parallel region:
//   1. pack W_ih and W_hh: one panel per W hidden units, the three gates of a unit side by side;
//   2. for each chunk of steps: gi = x W_ih^T + b for all its tokens, then the steps themselves, which read only h and
//      W_hh and finish their gates while the products are still in registers or in the nearest cache.
// A step is shared out in one of two ways: by rows of the batch (`lanes`: each lane runs through the chunk alone,
// nothing to wait for) or by hidden units (every worker keeps its part of W_hh in its own cache; one hand-over a step).
//
// Backward: the mirror image (steps in reverse; one hand-over a step because dh needs every gate gradient), then all
// products that do not depend on the order of steps: dx, dW_ih, dW_hh and the bias sums.
//
// Few units and many rows: see few_units.inl.h.
//
// Where a call has a single step there is nothing to amortise a packing over: gates come from dot products along the
// rows of the weights as they lie in memory.

// Where the tokens of a step lie. Steps are counted in the order in which the recurrence runs: step 0 is the first one
// computed, which for the second direction is the last of the sequence.
struct Steps {
  const GruShape& s;
  int64_t* offset;  // [T + 1] first token of every time of the sequence

  Steps(const GruShape& shape, int64_t* memory) : s(shape), offset(memory) {
    offset[0] = 0;
    for (int64_t t = 0; t < s.T; ++t) offset[t + 1] = offset[t] + (s.batch_sizes ? s.batch_sizes[t] : s.B);
  }
  int64_t time(int d, int64_t step) const { return d == 0 ? step : s.T - 1 - step; }
  // Rows that take part in `step`; none before the first and after the last.
  int64_t rows(int d, int64_t step) const {
    if (step < 0 || step >= s.T) return 0;
    const int64_t t = time(d, step);
    return offset[t + 1] - offset[t];
  }
  int64_t token(int d, int64_t step) const { return offset[time(d, step)]; }  // of row 0
  // Tokens of all steps before `step`.
  int64_t position(int d, int64_t step) const { return d == 0 ? offset[step] : s.N - offset[s.T - step]; }
};

// The input of row b at time t, which is token `token`.
template <class S>
FASTGRU_INLINE const S* input_row(const GruShape& s, int64_t t, int64_t b, int64_t token) {
  const S* x = static_cast<const S*>(s.x);
  return s.batch_sizes ? x + token * s.x_stride_b : x + t * s.x_stride_t + b * s.x_stride_b;
}

// A product's panels cut into items for a stage: several per worker, so that whoever is late is made up for, but each
// of some microseconds, and none cutting through what the widest kernel takes at once.
struct Items {
  int64_t panels, unit, count;

  // Of a product of `rows` rows with panels of `elements`.
  Items(int workers, int64_t panels_, int64_t rows, int64_t elements)
      : panels(panels_), unit(panels_at_once(int(imin(imax(1, rows), kRows)))) {
    const double microseconds = 1e-5 * double(panels) * double(elements) * double(rows + 4);
    count = workers * imin(16, imax(1, int64_t(microseconds / (2 * workers))));
    count = imax(1, imin(count, ceil_div(panels, unit)));
  }
  int64_t begin(int64_t item) const { return imin(panels, item * ceil_div(panels, unit) / count * unit); }
  int64_t end(int64_t item) const { return begin(item + 1); }
};

// How the steps are shared out among the workers; see the top of the file.
struct Sharing {
  int workers;
  int64_t lanes;  // by rows of the batch into this many lanes; 0: by hidden units

  Sharing(const Parallel& parallel, const GruShape& s, double flops, int64_t step_weight_bytes,
          int64_t total_weight_bytes) {
    workers = worth_workers(parallel, flops, double(total_weight_bytes));
    // Enough lanes to go round. More than one to a direction read its weights more than once: from the nearest cache,
    // and for two rows or more, that is cheaper than a hand-over a step.
    const int64_t needed = ceil_div(workers, s.D);
    if (needed == 1 || (step_weight_bytes <= l2_bytes() && s.B >= 2 * needed))
      lanes = needed * (step_weight_bytes <= l2_bytes() ? imax(1, imin(4, s.B / (kRows * needed))) : 1);
    else
      lanes = 0;
  }
};

constexpr int64_t kShort = 256;  // tokens

// Tokens of a chunk of steps: enough that reading W_ih once more per chunk costs little, few enough that what is
// computed for them stays in the cache. A short sequence is one chunk: no memory for the whole of W_ih, packed, then.
static int64_t steps_per_chunk(const GruShape& s, int64_t bytes_per_token) {
  if (s.N <= kShort) return s.T;
  const int64_t tokens = imax(64, l2_bytes() / 2 / imax(1, bytes_per_token));
  return imin(s.T, imax(1, tokens / s.B));
}
