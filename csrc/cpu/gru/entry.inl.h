// The passes as the table of an engine holds them: each call goes to the variant for its sizes.

template <class S>
static void gru_forward(const GruForward& f, const Parallel& parallel, const Scratch& scratch) {
  if (f.s.N == 0) return;
#if defined(FASTGRU_NATIVE_BF16)
  // Few units are computed in float by rows; so they are by units.
  if (f.s.H <= kFewUnits && f.s.I <= kFewInputs)
    return engine_avx512()->kernels[int(DType::bf16)].gru_forward(f, parallel, scratch);
#endif
  if (few_units(f.s)) return few_units_forward<S>(f, parallel, scratch);
  if (f.s.T == 1 && !f.s.batch_sizes) {
    const ForwardStep<S> forward(f, parallel, scratch);
    run_region(parallel, forward.workers, [&](Worker& worker) { forward.run(worker); });
  } else {
    const ForwardSequence<S> forward(f, parallel, scratch);
    run_region(parallel, forward.sharing.workers, [&](Worker& worker) { forward.run(worker); });
  }
}

template <class S>
static void gru_backward(const GruBackward& f, const Parallel& parallel, const Scratch& scratch) {
  const GruShape& s = f.s;
  if (s.N == 0) {
    if (f.dw_ih) {
      __builtin_memset(f.dw_ih, 0, size_t(s.D * 3 * s.H * s.I) * sizeof(S));
      __builtin_memset(f.dw_hh, 0, size_t(s.D * 3 * s.H * s.H) * sizeof(S));
      __builtin_memset(f.db_ih, 0, size_t(s.D * 3 * s.H) * sizeof(S));
      __builtin_memset(f.db_hh, 0, size_t(s.D * 3 * s.H) * sizeof(S));
    }
    return;
  }
#if defined(FASTGRU_NATIVE_BF16)
  if (s.H <= kFewUnits && s.I <= kFewInputs)
    return engine_avx512()->kernels[int(DType::bf16)].gru_backward(f, parallel, scratch);
#endif
  if (few_units(s)) return few_units_backward<S>(f, parallel, scratch);
  const Backward<S> backward(f, parallel, scratch);
  run_region(parallel, backward.sharing.workers, [&](Worker& worker) { backward.run(worker); });
}
