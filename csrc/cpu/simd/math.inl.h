// exp, sigmoid and tanh of a vector.
//
// All three share one reduction: x = n ln2 + r with |r| <= ln2 / 2, and e^r - 1 = r + r^2 Q(r), Q a polynomial
// (float: minimax, relative error 2.4e-10; double: the Taylor series, relative error 1.2e-17).
// tanh(a) = m / (2 + m) with m = e^(2a) - 1 = 2^n (e^r - 1) + (2^n - 1): no cancellation near zero, no branch.
// Bounds, checked over the whole float range by tests/test_whitebox.py: exp 1 ulp, sigmoid 2.5 ulp, tanh 2.5 ulp (of
// the smallest subnormal where the result is below the normal numbers). Signs of zero, infinities and NaN are right.

template <class C>
struct ExpTable;
template <>
struct ExpTable<float> {
  static constexpr float log2e = 1.44269504f, round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float q[] = {0.5f, 0.16666666f, 0.04166636f, 0.0083333896f, 0.0013940823f, 0.00019845893f};
  static constexpr int bias = 127, mantissa = 23;
  static constexpr float lowest = -104.0f, highest = 89.0f;  // beyond these the result is 0 and infinity
  static constexpr float saturated = 30.0f;                  // e^-30 is far below half an ulp of 1
};
template <>
struct ExpTable<double> {
  static constexpr double log2e = 1.4426950408889634, round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double q[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                 1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  static constexpr int bias = 1023, mantissa = 52;
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double saturated = 60.0;
};

// NaN stays NaN.
template <class C>
FASTGRU_INLINE vec<C> clamp(vec<C> x, C low, C high) {
  if constexpr (kClampInstructions && same<C, float>) return clamp_instructions(x, splat<C>(low), splat<C>(high));
  x = x < low ? splat<C>(low) : x;
  return x > high ? splat<C>(high) : x;
}

template <class C>
struct ExpParts {
  vec<C> m;        // e^r - 1
  vec<C> n;        // x = n ln2 + r, a whole number
  vec<C> shifted;  // n + `round`
};

// x within [lowest, highest], or NaN (m is then NaN, n anything).
template <class C>
FASTGRU_INLINE ExpParts<C> exp_parts(vec<C> x) {
  using E = ExpTable<C>;
  const vec<C> shifted = fma(x, splat<C>(E::log2e), splat<C>(E::round)), n = shifted - E::round;
  vec<C> r = fma(n, splat<C>(-E::ln2_hi), x);
  r = fma(n, splat<C>(-E::ln2_lo), r);
  constexpr int degree = int(sizeof(E::q) / sizeof(E::q[0])) - 1;
  vec<C> q = splat<C>(E::q[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) q = fma(q, r, splat<C>(E::q[i]));
  return {fma(r * r, q, r), n, shifted};
}

// 2^n for whole numbers n within the exponents of normal numbers, given as n + `round`: there n is in the low bits of
// the mantissa, in two's complement, and the shift drops the rest.
template <class C>
FASTGRU_INLINE vec<C> exp2_shifted(vec<C> shifted) {
  using ivec = typename Simd<C>::ivec;
  constexpr typename Simd<C>::ielem one = typename Simd<C>::ielem(ExpTable<C>::bias) << ExpTable<C>::mantissa;
  return (vec<C>)(((ivec)shifted << ExpTable<C>::mantissa) + one);
}

// v 2^n for whole numbers n, rounded once: into the subnormals and to infinity too.
template <class C>
FASTGRU_INLINE vec<C> scale(vec<C> v, vec<C> n) {
  if constexpr (kScaleInstruction) {
    return scale_instruction(v, n);
  } else {
    // In two factors, because 2^n itself may be subnormal or too large.
    constexpr C round = ExpTable<C>::round;
    const vec<C> shifted = n * C(0.5) + round, half = shifted - round;
    return v * exp2_shifted<C>(shifted) * exp2_shifted<C>(n - half + round);
  }
}

template <class C>
FASTGRU_INLINE vec<C> exp(vec<C> x) {
  using E = ExpTable<C>;
  const ExpParts<C> e = exp_parts<C>(clamp<C>(x, E::lowest, E::highest));
  return scale<C>(e.m + C(1), e.n);
}

template <class C>
FASTGRU_INLINE vec<C> abs(vec<C> x) {
  using ivec = typename Simd<C>::ivec;
  const ivec sign = (ivec)splat<C>(C(-0.0));
  return (vec<C>)((ivec)x & ~sign);
}

// 1 / (1 + e^-x) with e^-x = 2^n (1 + m), both divided by 2^n.
template <class C>
FASTGRU_INLINE vec<C> sigmoid(vec<C> x) {
  using E = ExpTable<C>;
  const ExpParts<C> e = exp_parts<C>(clamp<C>(-x, -E::saturated, -E::lowest));
  const vec<C> s = scale<C>(splat<C>(C(1)), -e.n);
  return s / (s + (e.m + C(1)));
}

template <class C>
FASTGRU_INLINE vec<C> tanh(vec<C> x) {
  using E = ExpTable<C>;
  using ivec = typename Simd<C>::ivec;
  const ivec sign = (ivec)splat<C>(C(-0.0));
  const ExpParts<C> e = exp_parts<C>(clamp<C>(x + x, -E::saturated, E::saturated));
  const vec<C> two_n = exp2_shifted<C>(e.shifted);
  const vec<C> m = fma(two_n, e.m, two_n - C(1));
  const vec<C> y = m / (m + C(2));
  return (vec<C>)(((ivec)y & ~sign) | ((ivec)x & sign));  // for the sign of zero
}
