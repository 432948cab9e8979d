// Which keys a query sees, by lengths, window and mask; and tiles of queries and keys. Included after gemm/strip.inl.h.
//
// Query i of sequence b sees key j of [range(b, i)) where its mask allows it:
//   diagonal - window_left <= j <= diagonal + window_right,   diagonal = i + offset(b),   j < keys(b),   i < queries(b)

constexpr int kForwardQueries = 96, kBackwardQueries = 132;  // most rows of a query tile; multiples of kStrip, even
// Keys of a tile; multiples of the micro-kernel's columns, backward also of kStrip.
constexpr int kForwardKeys = 512, kBackwardKeys = 192;

// Positions [begin, end).
struct Span {
  int64_t begin, end;

  bool empty() const { return end <= begin; }
};

// S is the storage type. Tiles have up to kQueries queries and kTileKeys keys.
template <class S, int kQueries, int kTileKeys>
struct Visibility {
  using C = compute_t<S>;
  using ivec = typename Simd<C>::ivec;
  static constexpr int W = lanes<C>;
  static constexpr int64_t kKeys = kTileKeys;
  static_assert(kTileKeys % (kAcross * W) == 0 && kQueries % kStrip == 0 && kQueries % 2 == 0);

  const AttentionShape& s;
  int64_t group;  // query heads of a key head
  int64_t key_tiles, tile_rows, query_tiles;

  explicit FASTGRU_METHOD Visibility(const AttentionShape& shape)
      : s(shape), group(s.Hq / s.Hk), key_tiles(ceil_div(s.Lk, kKeys)) {
    set_tile_rows(ceil_div(s.Lq, imax(1, ceil_div(s.Lq, kQueries))));
  }

  void set_tile_rows(int64_t rows) {
    tile_rows = imax(kStrip, imin(kQueries, ceil_div(rows, kStrip) * kStrip));
    query_tiles = ceil_div(s.Lq, tile_rows);
  }

  int64_t queries(int64_t b) const { return s.q_lengths ? s.q_lengths[b] : s.Lq; }
  int64_t keys(int64_t b) const { return s.k_lengths ? s.k_lengths[b] : s.Lk; }
  int64_t offset(int64_t b) const { return s.bottom_right ? keys(b) - queries(b) : 0; }
  int64_t tile_keys(int64_t tile) const { return imin(kKeys, s.Lk - tile * kKeys); }

  // Keys that lengths and window let query i see; the mask is not considered.
  Span range(int64_t b, int64_t i) const {
    const int64_t diagonal = i + offset(b);
    Span r = {s.window_left < 0 ? 0 : imax(0, diagonal - s.window_left),
              s.window_right < 0 ? keys(b) : imin(keys(b), diagonal + s.window_right + 1)};
    if (i >= queries(b) || r.end <= r.begin) r = {0, 0};
    return r;
  }
  // The smallest range that holds those of rows [i0, i0 + rows). Both ends grow with i, so the first and the last row
  // that see anything give it.
  Span range(int64_t b, int64_t i0, int64_t rows) const {
    const int64_t diagonal = offset(b), n = keys(b);
    int64_t first = i0, last = imin(i0 + rows, queries(b)) - 1;
    if (s.window_right >= 0) first = imax(first, -diagonal - s.window_right);
    if (s.window_left >= 0) last = imin(last, n - 1 + s.window_left - diagonal);
    if (n == 0 || first > last) return {s.Lk, 0};
    return {range(b, first).begin, range(b, last).end};
  }
  Span tiles(const Span& seen) const {
    if (seen.empty()) return {0, 0};
    return {seen.begin / kKeys, ceil_div(seen.end, kKeys)};
  }
  // The part of `seen` in a tile, as positions in the tile.
  Span within(const Span& seen, int64_t tile) const {
    return {imax(0, seen.begin - tile * kKeys), imin(kKeys, seen.end - tile * kKeys)};
  }

  // Lane mask of the keys j ... j + W that are in r.
  static FASTGRU_METHOD ivec inside(const Span& r, int64_t j) {
    typedef typename Simd<C>::ielem I;
    const ivec lane = lane_index<C>();
    return (lane >= I(imax(0, imin(W, r.begin - j)))) & (lane < I(imax(0, imin(W, r.end - j))));
  }
  // The row of the mask for query i, or null.
  FASTGRU_METHOD const uint8_t* mask_row(int64_t b, int64_t h, int64_t i) const {
    const uint8_t* mask = static_cast<const uint8_t*>(s.mask.data);
    return mask ? mask + b * s.mask.stride_b + h * s.mask.stride_h + i * s.mask.stride_l : nullptr;
  }
  // Scores c of the keys j ... j + W, -inf outside r and where the row of the mask, if any, is 0.
  FASTGRU_METHOD vec<C> hide(vec<C> c, const Span& r, const uint8_t* mask, int64_t j) const {
    if (mask) {
      typename PerLane<C>::bytes bytes = {};
      if (s.mask.stride_k == 0)
        bytes = bytes + *mask;
      else if (j + W <= s.Lk)
        __builtin_memcpy(&bytes, mask + j, sizeof bytes);
      else
        __builtin_memcpy(&bytes, mask + j, size_t(s.Lk - j));
      c = hide_zeros<C>(c, bytes);
    }
    if (j < r.begin || j + W > r.end) c = inside(r, j) ? c : splat<C>(-C(__builtin_inf()));
    return c;
  }
};
