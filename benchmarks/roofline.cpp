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

#if defined(__x86_64__)
constexpr int kRepeats = 20000;

// A burst is multiply-adds on registers alone, in enough chains to hide their latency. Returns its flops.
__attribute__((target("avx512f"))) double fma_burst_avx512() {
  __m512 a[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) a[i] = _mm512_set1_ps(1.0f + i);  // or the compiler keeps one of equal chains
  const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.001f);
  for (int k = 0; k < kRepeats; ++k) {
#pragma GCC unroll 24
    for (__m512& v : a) v = _mm512_fmadd_ps(v, b, c);
  }
  __m512 sum = a[0];
#pragma GCC unroll 24
  for (int i = 1; i < 24; ++i) sum = _mm512_add_ps(sum, a[i]);
  volatile float keep = _mm512_cvtss_f32(sum);
  (void)keep;
  return kRepeats * 24.0 * 32;
}

// Of 32 pairs of bfloat16, summed in float32.
__attribute__((target("avx512f,avx512bf16"))) double bf16_burst_avx512() {
  __m512 a[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) a[i] = _mm512_set1_ps(1.0f + i);
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.999f), _mm512_set1_ps(0.999f));
  const __m512bh c = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.001f), _mm512_set1_ps(0.001f));
  for (int k = 0; k < kRepeats; ++k) {
#pragma GCC unroll 24
    for (__m512& v : a) v = _mm512_dpbf16_ps(v, b, c);
  }
  __m512 sum = a[0];
#pragma GCC unroll 24
  for (int i = 1; i < 24; ++i) sum = _mm512_add_ps(sum, a[i]);
  volatile float keep = _mm512_cvtss_f32(sum);
  (void)keep;
  return kRepeats * 24.0 * 64;
}

__attribute__((target("avx2,fma"))) double fma_burst_avx2() {
  __m256 a[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) a[i] = _mm256_set1_ps(1.0f + i);
  const __m256 b = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.001f);
  for (int k = 0; k < kRepeats; ++k) {
#pragma GCC unroll 12
    for (__m256& v : a) v = _mm256_fmadd_ps(v, b, c);
  }
  __m256 sum = a[0];
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) sum = _mm256_add_ps(sum, a[i]);
  volatile float keep = _mm256_cvtss_f32(sum);
  (void)keep;
  return kRepeats * 12.0 * 16;
}

// Reads all of p[0:bytes], a multiple of 512, and returns bytes.
__attribute__((target("avx512f"))) double read_avx512(const float* p, size_t bytes) {
  __m512 sum[8];
#pragma GCC unroll 8
  for (__m512& v : sum) v = _mm512_setzero_ps();
  for (size_t i = 0; i < bytes / 4; i += 128) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = _mm512_add_ps(sum[j], _mm512_load_ps(p + i + j * 16));
  }
  volatile float keep = 0;
#pragma GCC unroll 8
  for (__m512& v : sum) keep = keep + _mm512_cvtss_f32(v);
  return double(bytes);
}

__attribute__((target("avx2"))) double read_avx2(const float* p, size_t bytes) {
  __m256 sum[8];
#pragma GCC unroll 8
  for (__m256& v : sum) v = _mm256_setzero_ps();
  for (size_t i = 0; i < bytes / 4; i += 64) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = _mm256_add_ps(sum[j], _mm256_load_ps(p + i + j * 8));
  }
  volatile float keep = 0;
#pragma GCC unroll 8
  for (__m256& v : sum) keep = keep + _mm256_cvtss_f32(v);
  return double(bytes);
}
#endif

}  // namespace

extern "C" {

// All three are of `threads` cores together, and 0 where the processor has no probe here.

// Float32 multiply-adds, in flop/s.
double fma_peak(int threads, double duration) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return rate(threads, duration, [](int) { return fma_burst_avx512(); });
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return rate(threads, duration, [](int) { return fma_burst_avx2(); });
#endif
  return 0;
}

// Multiply-adds of bfloat16 pairs, in flop/s; 0 without such instructions.
double bf16_peak(int threads, double duration) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return rate(threads, duration, [](int) { return bf16_burst_avx512(); });
#endif
  return 0;
}

// Bytes per second, each core going round and round through its own `bytes`.
double read_bandwidth(int threads, size_t bytes, double duration) {
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f");
  if (!wide && !__builtin_cpu_supports("avx2")) return 0;
  bytes = (bytes + 511) / 512 * 512;
  std::vector<float*> memory(threads);
  for (float*& m : memory) {
    m = static_cast<float*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    std::memset(m, 0, bytes);
  }
  const double result = rate(threads, duration,
                             [&](int t) { return wide ? read_avx512(memory[t], bytes) : read_avx2(memory[t], bytes); });
  for (float* m : memory) std::free(m);
  return result;
#endif
  return 0;
}

}  // extern "C"
