#include "backoff.h"

#include <algorithm>

#include "../platform.h"

namespace fastgru {
namespace {

// A pool that has not had work for this long may be asleep.
constexpr int64_t kPauseNs = 1'000'000;
thread_local int64_t last_end_ns = 0;  // of the last region

// Where another process holds a core, the thread there comes and goes, and a call waits for it longer than it would
// take alone. A call that waits as long as only a core taken away explains, or the second in a row of which a good part
// is waiting, makes the thread work alone for as long as the wait was; for twice as long if that comes soon after the
// last time, up to eight times. A pool that is asleep, after a pause or some time alone, takes a while to come back:
// that counts only where it takes as long as that, and the second time. (Results do not depend on the number of
// threads.)
constexpr int64_t kUsualWaitNs = 50'000, kTakenNs = 1'000'000, kPartOfCall = 4, kMostTimes = 8;
thread_local int64_t alone_until_ns = 0, alone_ns = 0, alone_times = 1;
thread_local bool waited_before = false;

}  // namespace

bool pool_may_sleep(int64_t now_ns) { return now_ns - last_end_ns > kPauseNs; }

bool works_alone() { return alone_until_ns > 0 && now_ns() < alone_until_ns; }

void note_wait(int64_t waited_ns, int64_t total_ns) {
  const int64_t end = now_ns(), begin = end - total_ns;
  const bool asleep = pool_may_sleep(begin), taken = waited_ns > kTakenNs;
  const bool waited = asleep ? taken : waited_ns > kUsualWaitNs && waited_ns > total_ns / kPartOfCall;
  if (waited && (waited_before || (taken && !asleep))) {
    const bool soon = begin - alone_until_ns < kMostTimes * alone_ns;
    alone_times = soon ? std::min(2 * alone_times, kMostTimes) : 1;
    alone_ns = alone_times * waited_ns;
    alone_until_ns = end + alone_ns;
  }
  waited_before = waited;
  last_end_ns = end;
}

}  // namespace fastgru
