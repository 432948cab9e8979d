#include "pool.h"

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "../platform.h"
#include "backoff.h"
#include "phases.h"

namespace fastgru {
namespace {

int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// A thread that wakes up on `core`, which is the caller's, goes to another one, by narrowing its affinity for a moment.
// The system would leave it there, even with another core idle, until it looks again some milliseconds later.
void leave_core(int core, int threads) {
#if defined(__linux__)
  cpu_set_t all;
  if (sched_getcpu() != core || sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < threads) return;
  cpu_set_t others = all;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) (void)sched_setaffinity(0, sizeof all, &all);
#endif
}

// When the caller comes to the end of a region, all work is done. Whoever is missing has no core yet, or it is the
// caller's, which naps give away: at the pool's own barrier the caller would keep it, spinning.
void nap_until_zero(const std::atomic<int64_t>& missing) {
  constexpr int kSpins = 1000;
  for (int spin = 0; missing.load(std::memory_order_acquire); ++spin) {
    if (spin < kSpins)
      relax();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(1));
  }
}

void run_parallel(int n, void (*body)(int, void*), void* arg) {
  const int core = current_core();
  const bool asleep = pool_may_sleep(now_ns());
  std::atomic<int64_t> missing{n};
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    if (begin > 0)
      leave_core(core, n);
    else if (asleep)
      sched_yield();  // to threads that have woken up on this core
    for (int64_t i = begin; i < end; ++i) body(int(i), arg);
    missing.fetch_sub(end - begin, std::memory_order_release);
    if (begin == 0) nap_until_zero(missing);
  });
}

}  // namespace

Parallel torch_threads() {
  const bool alone = forked_thread() || works_alone();
  return {alone ? 1 : int(torch::stable::get_num_threads()), run_parallel, note_wait};
}

}  // namespace fastgru
