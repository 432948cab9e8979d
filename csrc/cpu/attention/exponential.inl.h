// Exponential of softmax, to the precision of the storage type. Included after simd/math.inl.h and simd/reduce.inl.h.

// e^x as of(log_e x): 2^y where computed in float, e^y in double. -infinity gives 0, NaN gives NaN.
// Domain: y up to kSlack of online_softmax.inl.h plus rounding. Results below 2^-126 differ between instruction sets.
template <class S>
struct Exponential {
  using C = compute_t<S>;
  static constexpr bool base_two = sizeof(C) == 4;
  static constexpr C log_e = base_two ? C(1.4426950408889634) : C(1);  // of e, in the base of the exponential

  static FASTGRU_METHOD vec<C> of(vec<C> y) {
    if constexpr (!base_two) {
      return exp<C>(y);
    } else {
      // 2^r = 1 + r Q(r) for 0 <= r < 1: minimax, relative error 2e-9, and 3e-6 where the result is rounded to 16 bits.
      constexpr float exact[] = {0.69314706f, 0.24022909f, 0.055486184f, 0.009673775f, 0.001248229f, 0.00021565972f};
      constexpr float rough[] = {0.69304484f, 0.24128024f, 0.05224238f, 0.013426747f};
      constexpr int degree = sizeof(S) == 4 ? 5 : 3;
      const auto& q = [&]() -> const auto& {
        if constexpr (sizeof(S) == 4)
          return exact;
        else
          return rough;
      }();
      const vf32 r = fraction(y);
      vf32 sum = splat<float>(q[degree]);
#pragma GCC unroll 8
      for (int i = degree - 1; i >= 0; --i) sum = fma(sum, r, splat<float>(q[i]));
      return scale(fma(sum, r, splat<float>(1.0f)), y, r);
    }
  }

 private:
  // y - floor(y); 0 for -infinity.
  static FASTGRU_METHOD vf32 fraction(vf32& y) {
#if FASTGRU_VECTOR_BYTES == 64
    return (vf32)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    y = larger(splat<float>(-127.0f), y);  // scale() returns 0 for -127
#if FASTGRU_VECTOR_BYTES == 32
    return y - (vf32)_mm256_round_ps((__m256)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const vf32 near = (y + ExpTable<float>::round) - ExpTable<float>::round;
    return y - (near > y ? near - 1.0f : near);
#endif
#endif
  }
  // v 2^(y - r), r the fraction of y.
  static FASTGRU_METHOD vf32 scale(vf32 v, vf32 y, vf32 r) {
#if FASTGRU_VECTOR_BYTES == 64
    (void)r;
    return (vf32)_mm512_scalef_ps((__m512)v, (__m512)y);  // rounds y down by itself
#else
    // y - r is added to the exponent of v. NaN converts to INT_MIN or 0, which the shift turns into 0: v stays NaN.
    return (vf32)((vi32)v + (__builtin_convertvector(y - r, vi32) << 23));
#endif
  }
};
