// Gradient of the bias: ds, summed over the dimensions in which the bias is broadcast. Included after
// attention/backward.inl.h.
//
// A phase of its own, whose items own what they write: it computes ds again rather than share sums between workers.

// Gradient of one batch and head of the bias and one query tile, or of all query tiles where the bias is broadcast over
// queries.
template <class S>
inline void AttentionBackwardPass<S>::bias_gradient(const PerWorker& own, int64_t bias_b, int64_t bias_h,
                                                    int64_t bias_tile) const {
  const int64_t* shape = f.d_bias_shape;
  C* out = d_bias + (bias_b * shape[1] + bias_h) * shape[2] * shape[3];
  const int64_t first = shape[2] == 1 ? 0 : bias_tile * tile_rows;
  const int64_t last = shape[2] == 1 ? s.Lq : imin(s.Lq, first + tile_rows);
  C* to = out + (shape[2] == 1 ? 0 : first * shape[3]);
  __builtin_memset(to, 0, size_t((shape[2] == 1 ? 1 : last - first) * shape[3]) * sizeof(C));
  for (int64_t b = shape[0] == 1 ? 0 : bias_b; b < (shape[0] == 1 ? s.B : bias_b + 1); ++b)
    for (int64_t h = shape[1] == 1 ? 0 : bias_h; h < (shape[1] == 1 ? s.Hq : bias_h + 1); ++h)
      for (int64_t i0 = first; i0 < last; i0 += tile_rows) {
        const int64_t rows = imin(tile_rows, last - i0);
        const Span tiles = this->tiles(this->range(b, i0, rows));
        if (!tiles.empty()) load_queries(own, b, h, i0, rows);
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
          for (int64_t r0 = 0; r0 < rows; r0 += kStrip) {
            const int64_t count = imin(kStrip, rows - r0);
            const Span part = this->within(this->range(b, i0 + r0, count), tile);
            if (part.empty()) continue;
            score_gradients(own, b, h, i0, r0, count, tile, part, own.p, own.ds);
            for (int64_t i = 0; i < count; ++i) {
              C* row = out + (shape[2] == 1 ? 0 : (i0 + r0 + i) * shape[3]);
              for (int64_t v = part.begin / W * W; v < part.end; v += W) {
                const vec<C> ds = load(own.ds + i * kKeys + v);
                if (shape[3] == 1) {
                  *row += sum_lanes<C>(ds);
                  continue;
                }
                const int64_t j = tile * kKeys + v;
                const int left = int(imin(W, s.Lk - j));
                store_upto(row + j, load_upto(row + j, left) + ds, left);
              }
            }
          }
      }
  if constexpr (!same<S, C>) {
    const int64_t elements = (shape[2] == 1 ? 1 : last - first) * shape[3];
    for (int64_t e = 0; e < elements; ++e) store_one(static_cast<S*>(f.d_bias) + (to - d_bias) + e, to[e]);
  }
}
