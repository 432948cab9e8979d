// Contention back-off: after a call has waited for a core that another process holds, the thread runs its calls on
// itself alone for as long. Results do not depend on it, as they do not on the number of threads.
//
// A call counts as contended where it waits above 1 ms, or, the second time in a row, above 50 us and a quarter of the
// call. Alone is then for as long as the wait was, doubled on repetition, at most eightfold. Waking a pool that sleeps
// takes a while too: after a pause only waits above 1 ms count, and those the second time in a row.
// FASTGRU_BACKOFF=0 turns it off; setting another number of threads forgets what was seen.
#pragma once

#include <cstdint>

namespace fastgru {

class Backoff {
 public:
  static Backoff& of_this_thread();
  // How often calls of any thread have begun to run alone.
  static int64_t count();

  // Whether a call that may use `threads` should run alone.
  bool alone(int threads);
  // True where the thread's pool has not had work for so long that it may be asleep.
  bool pool_may_sleep(int64_t at_ns) const;
  // Records how long the caller of a region of `total_ns` waited for cores that something else had.
  void region_ended(int64_t waited_ns, int64_t total_ns);

 private:
  int threads_ = 0;
  bool waited_ = false;         // the last call did
  int64_t alone_until_ns_ = 0;  // 0: never
  int64_t alone_ns_ = 0;        // the last time
  int64_t factor_ = 1;          // of the wait, likewise
  int64_t last_end_ns_ = 0;     // of the last region
};

// Backoff::count() as an operator.
int64_t cpu_backoffs();

}  // namespace fastgru
