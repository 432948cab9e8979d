// Parallel phases separated by barriers, with work stealing.
//
// A phase is a number of independent items; the next phase starts when all of them are done. A worker claims the items
// of its own share first: what it used in the phase before is in its cache. After a short spin it claims what is left
// of other shares. A worker waits only for items that another has begun, never for a worker that does not run. So it
// does not matter how many workers really run, and when: one after the other (a nested parallel region), late (a
// sleeping pool), or with a core taken away in the middle.
//
// A phase costs one cache-line transfer per other thread: its completion counter. Claims of others are read only after
// the short spin.
//
// Memory order: an item's writes are published by the release on the counter of the worker that ran it, and seen
// through the acquire of every worker that enters the next phase. Counters only grow, and no item of a phase begins
// before the last of the phase before it is counted. So a sum of counters that reaches a phase's target, read one after
// the other, is exact.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "../platform.h"

namespace fastgru {

constexpr int kMaxWorkers = 256;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Phases {
 public:
  explicit Phases(int workers) : workers_(workers) {
    for (int i = 0; i < workers; ++i) {
      members_[i].claim.store(0, std::memory_order_relaxed);
      members_[i].finished.store(0, std::memory_order_relaxed);
    }
  }

 private:
  friend class Worker;
  struct Member {
    alignas(64) std::atomic<uint64_t> claim;    // high half the phase, low half the next item of this worker's share
    alignas(64) std::atomic<int64_t> finished;  // items that it has run, of any share
  };
  int workers_;
  Member members_[kMaxWorkers];
};

class Worker {
 public:
  Worker(Phases& phases, int index) : phases_(phases), index_(index) {}

  int index() const { return index_; }
  int workers() const { return phases_.workers_; }
  // How long it waited for others, but for the usual few microseconds.
  int64_t waited_ns() const { return waited_ns_; }

  // Runs item(i) for every i in [0, items), each on exactly one worker. When it returns, all of them are complete.
  // `reversed` walks every share from its end: what the last phase used last is still in the cache.
  template <class Item>
  void phase(int64_t items, bool reversed, Item&& item) {
    if (phases_.workers_ == 1) {
      for (int64_t i = 0; i < items; ++i) item(reversed ? items - 1 - i : i);
      return;
    }
    ++phase_;
    target_ += items;
    if (!run_share(index_, items, reversed, item)) return;
    for (int spin = 0; spin < kShortSpins; ++spin) {
      if (all_finished()) return;
      relax();
    }
    for (int v = 1; v < phases_.workers_; ++v)
      if (!run_share((index_ + v) % phases_.workers_, items, reversed, item)) return;
    wait();
  }

 private:
  static constexpr int kShortSpins = 16, kSpins = 1000;

  // Runs what is left of a share. False if the others have gone on to a later phase.
  template <class Item>
  bool run_share(int owner, int64_t items, bool reversed, Item&& item) {
    const int64_t lo = owner * items / phases_.workers_, hi = (owner + 1) * items / phases_.workers_;
    std::atomic<uint64_t>& claim = phases_.members_[owner].claim;
    int64_t ran = 0;
    uint64_t seen = claim.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t phase = seen >> 32;
      if (phase > phase_) return false;
      const int64_t next = phase == phase_ ? int64_t(seen & 0xffffffffu) : 0;
      if (next >= hi - lo) break;
      if (!claim.compare_exchange_weak(seen, (phase_ << 32) | uint64_t(next + 1), std::memory_order_acq_rel,
                                       std::memory_order_relaxed))
        continue;
      item(reversed ? hi - 1 - next : lo + next);
      ++ran;
      seen = claim.load(std::memory_order_relaxed);
    }
    if (ran) {
      std::atomic<int64_t>& finished = phases_.members_[index_].finished;
      finished.store(finished.load(std::memory_order_relaxed) + ran, std::memory_order_release);
    }
    return true;
  }

  bool all_finished() const {
    int64_t sum = 0;
    for (int v = 0; v < phases_.workers_; ++v) sum += phases_.members_[v].finished.load(std::memory_order_acquire);
    return sum >= target_;
  }

  // The barrier: spins for some ten microseconds, then gives the core away, which the awaited worker may need.
  void wait() {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (all_finished()) return;
      relax();
    }
    const int64_t begin = now_ns();
    while (!all_finished()) sched_yield();
    waited_ns_ += now_ns() - begin;
  }

  Phases& phases_;
  int index_;
  uint64_t phase_ = 0;
  int64_t target_ = 0;
  int64_t waited_ns_ = 0;
};

}  // namespace fastgru
