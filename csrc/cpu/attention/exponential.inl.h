// Powers for the weights of attention. Included after simd/reduce.inl.h.

// A power for weights, which are at most 2^kSlack but for rounding: 2^y for float, as many digits of it as the storage
// type can tell; e^y for double. 0 for -infinity, NaN for NaN. (What becomes of a power below the normal numbers is
// left to the processor.)
template <class S>
struct Exponential {
  using C = compute_t<S>;
  static constexpr bool base_two = sizeof(C) == 4;
  static constexpr C log_e = base_two ? C(1.4426950408889634) : C(1);  // e^x is the power of log_e x

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
  // y less the largest whole number that is not above it; 0 for -infinity.
  static FASTGRU_METHOD vf32 fraction(vf32& y) {
#if FASTGRU_VECTOR_BYTES == 64
    return (vf32)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    y = larger(splat<float>(-127.0f), y);  // whose power comes out as 0 below
#if FASTGRU_VECTOR_BYTES == 32
    return y - (vf32)_mm256_round_ps((__m256)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const vf32 near = (y + ExpTable<float>::round) - ExpTable<float>::round;
    return y - (near > y ? near - 1.0f : near);
#endif
#endif
  }
  // 2^(y - r) times v.
  static FASTGRU_METHOD vf32 scale(vf32 v, vf32 y, vf32 r) {
#if FASTGRU_VECTOR_BYTES == 64
    (void)r;
    return (vf32)_mm512_scalef_ps((__m512)v, (__m512)y);  // rounds y down by itself
#else
    // Added to the exponent. That of NaN is the lowest whole number or 0, of which the shift leaves nothing.
    return (vf32)((vi32)v + (__builtin_convertvector(y - r, vi32) << 23));
#endif
  }
};
