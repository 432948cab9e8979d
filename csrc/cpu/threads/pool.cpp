// Runs a region on torch's pool of threads: at::parallel_for, which OpenMP serves.
#include "pool.h"

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "../platform.h"
#include "affinity.h"
#include "backoff.h"
#include "phases.h"

namespace fastgru {
namespace {

// When the caller comes to the end of a region, all work is done. A thread that is missing has no core yet, or it has
// the caller's, which naps give away: at the pool's own barrier the caller would keep it, spinning.
void nap_until_zero(const std::atomic<int64_t>& missing) {
  constexpr int kSpins = 1000;
  for (int spin = 0; missing.load(std::memory_order_acquire); ++spin) {
    if (spin < kSpins)
      relax();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(1));
  }
}

// A body that threw would leave `missing` above zero and the caller waiting for ever: it is noexcept.
void run_parallel(int n, RegionBody body, void* arg) {
  const int core = core_to_avoid();
  const bool asleep = Backoff::of_this_thread().pool_may_sleep(now_ns());
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

void note_wait(int64_t waited_ns, int64_t total_ns) { Backoff::of_this_thread().region_ended(waited_ns, total_ns); }

}  // namespace

Parallel torch_threads() {
  const int threads = int(torch::stable::get_num_threads());
  const bool alone = forked_thread() || Backoff::of_this_thread().alone(threads);
  return {alone ? 1 : threads, run_parallel, note_wait};
}

}  // namespace fastgru
