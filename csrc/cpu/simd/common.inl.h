// Loads, stores and conversions of every storage type, in terms of what the file of an instruction set defines.
//
// Multiply-adds are written out as fma(): together with -ffp-contract=off this fixes the rounding of every expression,
// so a value never depends on which template instance or tile shape produced it.

// One multiply-add of a tile: acc + a * b, a[0 .. kPair) the same for all lanes, b[lane][0 .. kPair).
FASTGRU_INLINE vf32 multiply_add(const float* a, vf32 b, vf32 acc) { return fma(splat<float>(*a), b, acc); }
FASTGRU_INLINE vf64 multiply_add(const double* a, vf64 b, vf64 acc) { return fma(splat<double>(*a), b, acc); }

// The cache lines of p[0 .. n).
template <class S>
FASTGRU_INLINE void prefetch(const S* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + i);
}

// ---- storage -> compute ----

FASTGRU_INLINE vf32 widen(const bf16*, vu16half bits) { return (vf32)(__builtin_convertvector(bits, vu32) << 16); }

FASTGRU_INLINE vf32 load(const float* p) {
  vf32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTGRU_INLINE vf64 load(const double* p) {
  vf64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
FASTGRU_INLINE vf32 load(const S* p) {
  vu16half bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return widen(p, bits);
}

// The first n < lanes elements; the others are zero. Touches nothing beyond them.
template <class S>
FASTGRU_INLINE vec<compute_t<S>> load_n(const S* p, int n) {
  if constexpr (kMaskedMemory && sizeof(S) >= 4) return masked_load(p, n);
  S tmp[lanes<compute_t<S>>] = {};
  for (int i = 0; i < n; ++i) tmp[i] = p[i];
  return load(tmp);
}

// ---- compute -> storage, round to nearest even ----

FASTGRU_INLINE vu16half narrow(const bf16*, vf32 v) {
  const vu32 bits = (vu32)v;
  const vu32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu32 quiet = (bits >> 16) | 0x40u;  // a NaN must not round up to infinity
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, vu16half);
}

FASTGRU_INLINE void store(float* p, vf32 v) { __builtin_memcpy(p, &v, sizeof v); }
FASTGRU_INLINE void store(double* p, vf64 v) { __builtin_memcpy(p, &v, sizeof v); }
template <class S>
FASTGRU_INLINE void store(S* p, vf32 v) {
  const vu16half bits = narrow(p, v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first n < lanes elements only.
template <class S>
FASTGRU_INLINE void store_n(S* p, vec<compute_t<S>> v, int n) {
  if constexpr (kMaskedMemory && sizeof(S) >= 4) return masked_store(p, v, n);
  S tmp[lanes<compute_t<S>>];
  store(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}

// Whole vector or its first n elements.
template <class S>
FASTGRU_INLINE vec<compute_t<S>> load_upto(const S* p, int n) {
  return n >= lanes<compute_t<S>> ? load(p) : load_n(p, n);
}
template <class S>
FASTGRU_INLINE void store_upto(S* p, vec<compute_t<S>> v, int n) {
  if (n >= lanes<compute_t<S>>)
    store(p, v);
  else
    store_n(p, v, n);
}

template <class S>
FASTGRU_INLINE compute_t<S> load_one(const S* p) {
  if constexpr (sizeof(S) == 2)
    return load_n(p, 1)[0];
  else
    return *p;
}
template <class S>
FASTGRU_INLINE void store_one(S* p, compute_t<S> v) {
  if constexpr (sizeof(S) == 2)
    store_n(p, splat<float>(v), 1);
  else
    *p = v;
}
