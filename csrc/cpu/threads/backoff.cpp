// Decides when a thread's calls run alone; the rule stands in backoff.h.
#include "backoff.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../platform.h"

namespace fastgru {
namespace {

constexpr int64_t kPauseNs = 1'000'000;   // a pool without work for this long may be asleep
constexpr int64_t kUsualWaitNs = 50'000;  // of a region whose threads all have a core
constexpr int64_t kTakenNs = 1'000'000;   // a wait that only a core taken away explains
constexpr int64_t kPartOfCall = 4;        // shorter waits count from this part of the call on
constexpr int64_t kMostFactor = 8;

std::atomic<int64_t> times{0};

bool enabled() {
  static const bool on = [] {
    const char* wanted = std::getenv("FASTGRU_BACKOFF");
    return !(wanted && std::strcmp(wanted, "0") == 0);
  }();
  return on;
}

}  // namespace

Backoff& Backoff::of_this_thread() {
  thread_local Backoff backoff;
  return backoff;
}

int64_t cpu_backoffs() { return Backoff::count(); }

int64_t Backoff::count() { return times.load(std::memory_order_relaxed); }

bool Backoff::pool_may_sleep(int64_t at_ns) const { return at_ns - last_end_ns_ > kPauseNs; }

bool Backoff::alone(int threads) {
  if (threads != threads_) {
    const int64_t last_end_ns = last_end_ns_;
    *this = Backoff();
    threads_ = threads;
    last_end_ns_ = last_end_ns;
  }
  return alone_until_ns_ > 0 && now_ns() < alone_until_ns_;
}

void Backoff::region_ended(int64_t waited_ns, int64_t total_ns) {
  const int64_t end = now_ns(), begin = end - total_ns;
  const bool asleep = pool_may_sleep(begin), taken = waited_ns > kTakenNs;
  const bool waited = asleep ? taken : waited_ns > kUsualWaitNs && waited_ns > total_ns / kPartOfCall;
  if (enabled() && waited && (waited_ || (taken && !asleep))) {
    const bool soon = begin - alone_until_ns_ < kMostFactor * alone_ns_;
    factor_ = soon ? std::min(2 * factor_, kMostFactor) : 1;
    alone_ns_ = factor_ * waited_ns;
    alone_until_ns_ = end + alone_ns_;
    times.fetch_add(1, std::memory_order_relaxed);
  }
  waited_ = waited;
  last_end_ns_ = end;
}

}  // namespace fastgru
