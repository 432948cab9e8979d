// Operands of attention's products, from rows of q, k, v and do: packed, copied, or in place where the layout allows
// it. Included after attention/scores.inl.h.
//
// A right operand holds rows of a head either as its columns, for q k^T and do v^T, or as its rows, for p v, dx k, dx^T
// q and p^T do. As rows they are multiplied by weights, and a weight of zero must hide NaN and infinity. So NaN and
// infinity are packed as zero, and the caller adds them one by one.

// NaN and infinity.
template <class C>
FASTGRU_INLINE bool nonfinite(C x) {
  return !(x - x == C(0));
}

template <class S, int kQueries, int kTileKeys>
struct Operands : Scores<S, kQueries, kTileKeys> {
  using Base = Scores<S, kQueries, kTileKeys>;
  using Base::kKeys;
  using Base::s;
  using Base::W;
  using typename Base::C;
  using E = operand_t<S>;

  explicit FASTGRU_METHOD Operands(const AttentionShape& shape) : Base(shape) {}

  static int64_t padded(int64_t columns) { return ceil_div(columns, W) * W; }

  // Packs rows [j0, j0 + n) of a head as the columns of a right operand of depth `columns`.
  void pack_as_columns(const Heads& from, int64_t b, int64_t h, int64_t j0, int64_t n, int64_t columns, E* to) const {
    const Right<E> right = as_columns(to, n, columns);
    for (int64_t v = 0; v < right.vectors; ++v)
      pack_transposed(from.row<const S>(b, h, j0 + v * W), from.stride_l, int(imin(W, n - v * W)), columns,
                      right.group(v / kAcross) + v % kAcross * W * kPair<E>, right.width(v / kAcross) * W * kPair<E>);
  }
  // The operand that pack_as_columns() packed.
  static Right<E> as_columns(const E* data, int64_t n, int64_t columns) {
    return {data, padded_depth<E>(columns), ceil_div(n, W)};
  }

  // Whether the rows of a head can be a right operand in place, provided that they are finite.
  static bool is_row_operand(const Heads& from, int64_t columns) {
    return same<S, E> && kPair<E> == 1 && columns % W == 0 && from.stride_l == columns;
  }

  // Packs rows [j0, j0 + n) of a head as the rows of a right operand, NaN and infinity as zero, by way of `finite`
  // [n][columns]. Returns whether there were any. Finite rows that can be used in place are not packed.
  bool pack_as_rows(const Heads& from, int64_t b, int64_t h, int64_t j0, int64_t n, int64_t columns, S* finite,
                    E* to) const {
    bool nonfinite_rows = false;
    for (int64_t l = 0; l < n; ++l) {
      const S* row = from.row<const S>(b, h, j0 + l);
      vec<C> difference = {};
      for (int64_t d = 0; d < columns; d += W) {
        const vec<C> x = load_upto(row + d, int(imin(W, columns - d)));
        difference += x - x;
      }
      nonfinite_rows |= nonfinite(sum_lanes<C>(difference));
    }
    if (!nonfinite_rows && is_row_operand(from, columns)) return false;
    if (nonfinite_rows)
      for (int64_t l = 0; l < n; ++l)
        for (int64_t d = 0; d < columns; d += W) {
          const int left = int(imin(W, columns - d));
          const vec<C> x = load_upto(from.row<const S>(b, h, j0 + l) + d, left);
          store_upto(finite + l * columns + d, x - x == C(0) ? x : vec<C>{}, left);
        }
    const Right<E> right = {to, padded_depth<E>(n), ceil_div(columns, W)};
    for (int64_t g = 0; g < right.groups(); ++g)
      pack_rows<E>(
          [&](int64_t l) {
            return (nonfinite_rows ? finite + l * columns : from.row<const S>(b, h, j0 + l)) + g * kAcross * W;
          },
          n, columns - g * kAcross * W, right.width(g), right.group(g));
    return nonfinite_rows;
  }
  // The operand that pack_as_rows() packed or left in place; nonfinite_rows: what it returned.
  static Right<E> as_rows(const Heads& from, int64_t b, int64_t h, int64_t j0, const E* packed, bool nonfinite_rows,
                          int64_t n, int64_t columns) {
    const int64_t vectors = ceil_div(columns, W);
    if (!nonfinite_rows && is_row_operand(from, columns))
      return {from.row<const E>(b, h, j0), n, vectors, from.stride_l};
    return {packed, padded_depth<E>(n), vectors};
  }

  static Left<E> by_rows(const E* data, int64_t ld) { return {data, ld, kPair<E>}; }

  // Whether strips of rows of so many columns are left operands in place. Otherwise, and for a strip with fewer than
  // kStrip rows, products use copies.
  static constexpr bool in_place(int64_t columns) { return same<S, E> && columns % kPair<E> == 0; }

  // Copies the rows of a query tile that are not used in place to `to` [rows, whole strips][padded depth], zero beyond.
  void copy_rows(const Heads& from, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t columns, E* to) const {
    const int64_t depth = padded_depth<E>(columns), whole = rows / kStrip * kStrip;
    for (int64_t i = in_place(columns) ? whole : 0; i < rows; ++i)
      copy_operand(from.row<const S>(b, h, i0 + i), columns, to + i * depth, depth);
    const int64_t missing = ceil_div(rows, kStrip) * kStrip - rows;
    __builtin_memset(to + rows * depth, 0, size_t(missing * depth) * sizeof(E));
  }
  // Rows [r0, r0 + count) of a query tile as a left operand.
  static Left<E> strip_of(const Heads& from, const E* copies, int64_t b, int64_t h, int64_t i0, int64_t r0,
                          int64_t count, int64_t columns) {
    if (in_place(columns) && count == kStrip && from.data)
      return by_rows(from.row<const E>(b, h, i0 + r0), from.stride_l);
    const int64_t depth = padded_depth<E>(columns);
    return by_rows(copies + r0 * depth, depth);
  }

  // q . k of the keys j ... j + W, in lanes; keys beyond `last` repeat it. For few queries, in both passes: the
  // backward pass needs the bits of the forward pass, because it subtracts the same m.
  vec<C> dot_products(const Heads& k, int64_t b, int64_t hk, int64_t j, int64_t last, const C* q) const {
    const S* row[W];
    vec<C> sums[W];
    const S* const first = k.row<const S>(b, hk, j);
    const int64_t ld = k.stride_l;
    if (j + W - 1 <= last) {
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) row[l] = first + l * ld;
    } else {
      for (int l = 0; l < W; ++l) row[l] = first + imin(l, last - j) * ld;
    }
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) sums[l] = vec<C>{};
    int64_t d = 0;
    for (; d + W <= s.D; d += W) {
      const vec<C> qd = load(q + d);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) sums[l] = fma(qd, load(row[l] + d), sums[l]);
    }
    if (d < s.D)
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) sums[l] = fma(load(q + d), load_n(row[l] + d, int(s.D - d)), sums[l]);
    sum_neighbours<C>(sums);
    return sums[0];
  }

  // out[kStrip][kKeys] = products of a strip with the packed rows of a tile, at least those in `part`.
  static void strip_scores(const Left<E>& rows, const E* packed, int64_t keys, int64_t columns, const Span& part,
                           C* out) {
    const Right<E> right = as_columns(packed, keys, columns);
    multiply<Into::kStore>(kStrip, rows, right, part.begin / (kAcross * W), ceil_div(part.end, kAcross * W), 0,
                           right.depth, out, kKeys);
  }

  static void write_row(const C* from, int64_t columns, C factor, S* to) {
    for (int64_t d = 0; d < columns; d += W) store_upto(to + d, load(from + d) * factor, int(imin(W, columns - d)));
  }
};
