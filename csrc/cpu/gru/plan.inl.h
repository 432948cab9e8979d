// The plan of a call: where the tokens of each step lie, and how steps and products are shared out.
//
// Forward, in one parallel region:
//   1. pack W_ih and W_hh: one panel per W hidden units, the three gates of a unit side by side;
//   2. for each chunk of steps: gi = x W_ih^T + b for all its tokens, then the steps themselves. They read only h and
//      W_hh, and finish their gates while the products are still in registers or in the nearest cache.
// Steps are parallel over slices of the batch (no synchronisation within a chunk) or over hidden units (one barrier per
// step; every worker keeps its part of W_hh in its own cache).
//
// Backward: the mirror image. Steps run in reverse, with one barrier per step because dh needs every gate gradient.
// Then come all products that do not depend on the order of steps: dx, dW_ih, dW_hh and the bias sums.
//
// A batch of many rows and few hidden units: few_units.inl.h. A single step: single_step.inl.h.

// The tokens of each step. Steps are counted in the order in which the recurrence runs: step 0 is the first one
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

// The panels of a product, cut into the items of a phase: several for each worker, so that others can make up for a
// late one, but each of some microseconds. No item cuts through what the widest kernel takes at once.
struct PanelItems {
  static constexpr double kMicrosecondsPerElement = 1e-5;  // of a panel, for each row; rough: it only cuts items
  static constexpr int64_t kRowsToLoadPanel = 4;           // reading a panel costs as much as this many rows
  static constexpr int kMicrosecondsPerItem = 2;           // at least
  static constexpr int64_t kMostPerWorker = 16;

  int64_t panels, unit, count;

  // Of a product of `rows` rows with panels of `elements`.
  PanelItems(int workers, int64_t panels_, int64_t rows, int64_t elements)
      : panels(panels_), unit(panels_at_once(int(imin(imax(1, rows), kRows)))) {
    const double microseconds =
        kMicrosecondsPerElement * double(panels) * double(elements) * double(rows + kRowsToLoadPanel);
    count = workers * imin(kMostPerWorker, imax(1, int64_t(microseconds / (kMicrosecondsPerItem * workers))));
    count = imax(1, imin(count, ceil_div(panels, unit)));
  }
  int64_t begin(int64_t item) const { return imin(panels, item * ceil_div(panels, unit) / count * unit); }
  int64_t end(int64_t item) const { return begin(item + 1); }
};

// How the steps are shared out among the workers; see the top of the file.
struct Sharing {
  static constexpr int64_t kMostSlices = 4;  // for each worker, of kRows rows at least

  int workers;
  int64_t batch_slices;  // 0: by hidden units

  Sharing(const Parallel& parallel, const GruShape& s, double flops, int64_t step_weight_bytes,
          int64_t total_weight_bytes) {
    workers = worth_workers(parallel, flops, double(total_weight_bytes));
    // A slice for every worker. More than one to a direction read its weights more than once: from the nearest cache,
    // and for two rows or more, that is cheaper than one barrier per step.
    const int64_t needed = ceil_div(workers, s.D);
    if (needed == 1 || (step_weight_bytes <= l2_bytes() && s.B >= 2 * needed))
      batch_slices =
          needed * (step_weight_bytes <= l2_bytes() ? imax(1, imin(kMostSlices, s.B / (kRows * needed))) : 1);
    else
      batch_slices = 0;
  }
};

constexpr int64_t kShortSequence = 256;  // tokens
constexpr int64_t kLeastChunkTokens = 64;

// Tokens of a chunk of steps: enough that reading W_ih once more per chunk costs little, few enough that their gi stays
// in half the second-level cache. A short sequence is one chunk: then the packed W_ih is never held whole.
static int64_t steps_per_chunk(const GruShape& s, int64_t bytes_per_token) {
  if (s.N <= kShortSequence) return s.T;
  const int64_t tokens = imax(kLeastChunkTokens, l2_bytes() / 2 / imax(1, bytes_per_token));
  return imin(s.T, imax(1, tokens / s.B));
}
