// Dropout mask of attention, a hash of seed, row and column. Included after simd/reduce.inl.h.

// A 64-bit key for each row (b, h, i), by splitmix64; every backend computes the same bits.
struct RowKey {
  uint32_t low, high;

  RowKey(int64_t seed, int64_t row) {
    uint64_t x = uint64_t(row) * 0x9E3779B97F4A7C15u + uint64_t(seed);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    low = uint32_t(x), high = uint32_t(x >> 32);
  }
};

// The finaliser of murmur3.
template <class B>
FASTGRU_INLINE B mix(B x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Keep mask of columns j ... j + W: all bits set where the hash of row key and column is not below drop_below.
template <class C>
FASTGRU_INLINE typename Simd<C>::ivec keep_mask(RowKey key, int64_t j, uint32_t drop_below) {
  typedef typename PerLane<C>::bits B;
  const B column = __builtin_convertvector(lane_index<C>(), B) + uint32_t(j);
  const B bits = mix<B>(mix<B>(column * 0x9E3779B9u + key.low) ^ key.high);
  return __builtin_convertvector((typename PerLane<C>::ints)(bits >= drop_below), typename Simd<C>::ivec);
}
