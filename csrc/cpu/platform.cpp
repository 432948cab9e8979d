// Asks the system for the size of a cache, the time, preemptions and forks.
#include "platform.h"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>

namespace fastgru {
namespace {

// OpenMP keeps a pool for every thread that has run a region, in any library. A child of fork has a copy of that thread
// but none of the pool's: a region would wait for them for ever. So the thread that comes through a fork runs alone, in
// that child and its own; threads that the child starts make pools of their own.
thread_local bool forked = false;
[[maybe_unused]] const int watches_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (reported > 0) return int64_t(reported);
#endif
    return int64_t(1) << 20;
  }();
  return bytes;
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t preemptions() {
#if defined(RUSAGE_THREAD)
  rusage usage;
  if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_nivcsw;
#endif
  return 0;
}

bool forked_thread() { return forked; }

}  // namespace fastgru
