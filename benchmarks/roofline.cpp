// Probes of what the processor can do at best, for benchmarks/roofline.py: arithmetic on registers, and reads.
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs work() on every thread again and again for about `duration`, and returns how much of it was done per second.
template <class Work>
double rate(int threads, double duration, Work work) {
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      work(t);
      double done = 0, start = seconds(), elapsed;
      do {
        done += work(t);
        elapsed = seconds() - start;
      } while (elapsed < duration);
      rates[t] = done / elapsed;
    });
  double total = 0;
  for (int t = 0; t < threads; ++t) {
    pool[t].join();
    total += rates[t];
  }
  return total;
}

// Compiled on the machine that is probed, for what it has.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kChains = 24;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kWidth = 8, kChains = 12;
#endif

#if defined(__AVX2__) && defined(__FMA__)
typedef float Vector __attribute__((vector_size(4 * kWidth)));

// Multiply-adds on registers alone, in enough chains to hide their latency. Returns the flops, of which step(v) has
// `flops`.
template <class Step>
double burst(double flops, Step step) {
  constexpr int kRepeats = 20000;
  Vector a[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) a[i] = Vector{} + (2.0f + i);  // or equal chains are one, and 1 stays 1: no work
  for (int k = 0; k < kRepeats; ++k) {
#pragma GCC unroll 24
    for (Vector& v : a) v = step(v);
  }
  Vector sum = a[0];
#pragma GCC unroll 24
  for (int i = 1; i < kChains; ++i) sum += a[i];
  volatile float keep = sum[0];
  (void)keep;
  return flops * kRepeats * kChains;
}

// Reads all of p[0:bytes], a multiple of 512, and returns bytes.
double read(const float* p, size_t bytes) {
  Vector sum[8] = {};
  for (size_t i = 0; i < bytes / 4; i += 8 * kWidth) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += *reinterpret_cast<const Vector*>(p + i + j * kWidth);
  }
  volatile float keep = 0;
  for (const Vector& v : sum) keep = keep + v[0];
  return double(bytes);
}
#endif

}  // namespace

extern "C" {

// All three are of `threads` cores together, and 0 where the processor has no probe here.

// Float32 multiply-adds, in flop/s.
double fma_peak(int threads, double duration) {
#if defined(__AVX2__) && defined(__FMA__)
  return rate(threads, duration, [](int) {
    const Vector b = Vector{} + 0.999f, c = Vector{} + 0.001f;
    return burst(2 * kWidth, [=](Vector v) { return v * b + c; });
  });
#endif
  return 0;
}

// Multiply-adds of bfloat16 pairs, summed in float32, in flop/s; 0 without such instructions.
double bf16_peak(int threads, double duration) {
#if defined(__AVX512BF16__)
  return rate(threads, duration, [](int) {
    const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.001f);
    const __m512bh bb = _mm512_cvtne2ps_pbh(b, b), cc = _mm512_cvtne2ps_pbh(c, c);
    return burst(4 * kWidth, [=](Vector v) -> Vector { return _mm512_dpbf16_ps(v, bb, cc); });
  });
#endif
  return 0;
}

// Bytes per second, each core going round and round through its own `bytes`.
double read_bandwidth(int threads, size_t bytes, double duration) {
#if defined(__AVX2__) && defined(__FMA__)
  bytes = (bytes + 511) / 512 * 512;
  std::vector<float*> memory(threads);
  for (float*& m : memory) {
    m = static_cast<float*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    std::memset(m, 0, bytes);
  }
  const double result = rate(threads, duration, [&](int t) { return read(memory[t], bytes); });
  for (float* m : memory) std::free(m);
  return result;
#endif
  return 0;
}

}  // extern "C"
