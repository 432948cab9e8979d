// Selections and exchanges of lanes, and the transposition and sums made of them, on compiler vectors alone.

// The first n lanes of v; zero in the others, whatever they held.
template <class C>
FASTGRU_INLINE vec<C> keep(vec<C> v, int n) {
  typename Simd<C>::ivec lane;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) lane[i] = i;
  return lane < n ? v : vec<C>{};
}

template <class C>
FASTGRU_INLINE vec<C> first_lanes(int n, vec<C> a, vec<C> b) {
  typename Simd<C>::ivec lane;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) lane[i] = i;
  return lane < n ? a : b;
}

// Two vectors, exchanged in groups of D lanes: `low` takes the even groups of both, `high` the odd ones.
template <class C, int D>
FASTGRU_INLINE void interleave(vec<C> a, vec<C> b, vec<C>& low, vec<C>& high) {
  typename Simd<C>::ivec from_low, from_high;
#pragma GCC unroll 16
  for (int l = 0; l < lanes<C>; ++l) {
    from_low[l] = (l & D) ? lanes<C> + l - D : l;
    from_high[l] = (l & D) ? lanes<C> + l : l + D;
  }
  low = __builtin_shuffle(a, b, from_low);
  high = __builtin_shuffle(a, b, from_high);
}

// Transposes a W x W block held in registers: log2(W) rounds of exchanges between pairs of rows.
template <class C, int D = 1>
FASTGRU_INLINE void transpose_block(vec<C>* rows) {
  if constexpr (D < lanes<C>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<C>; ++i)
      if ((i & D) == 0) interleave<C, D>(rows[i], rows[i + D], rows[i], rows[i + D]);
    transpose_block<C, 2 * D>(rows);
  }
}

// The sums of the lanes of W vectors, as the lanes of the first: a tree of neighbours.
template <class C, int D = 1>
FASTGRU_INLINE void sum_neighbours(vec<C>* rows) {
  if constexpr (D < lanes<C>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<C>; i += 2 * D) {
      vec<C> low, high;
      interleave<C, D>(rows[i], rows[i + D], low, high);
      rows[i] = low + high;
    }
    sum_neighbours<C, 2 * D>(rows);
  }
}
