// A team of workers that walks through the same list of stages together.
//
// A stage is a number of independent items; the next stage starts when all of them are done. Items are claimed, not
// assigned: a worker takes its own share first (so that it finds in its cache what it used in the last stage) and then,
// if the others have not finished within a moment, what is left of their shares. Nobody ever waits for a worker that is
// not running, only for items that a worker has begun. So nothing is assumed of how many of the workers really run, and
// when: one after the other (a nested parallel region), late (a sleeping pool), or with a core taken away in the
// middle.
//
// What a stage costs is cache lines that change hands. While all keep pace that is one for every other worker, its
// count of finished items: a claim is looked at by none but its owner before the moment is over.
//
// Memory order: an item's writes are published by the release on the count of whoever ran it, and seen through the
// acquire of whoever enters the next stage. Counts only grow, and no item of a stage begins before the last of the
// stage before it is counted: a sum of counts that reaches a stage's target, read one after the other, is no guess.
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

class Team {
 public:
  explicit Team(int workers) : workers_(workers) {
    for (int i = 0; i < workers; ++i) {
      members_[i].claim.store(0, std::memory_order_relaxed);
      members_[i].finished.store(0, std::memory_order_relaxed);
    }
  }

 private:
  friend class Worker;
  struct Member {
    alignas(64) std::atomic<uint64_t> claim;    // high half the stage, low half the next item of this worker's share
    alignas(64) std::atomic<int64_t> finished;  // items that it has run, of any share
  };
  int workers_;
  Member members_[kMaxWorkers];
};

class Worker {
 public:
  Worker(Team& team, int index) : team_(team), index_(index) {}

  int index() const { return index_; }
  int workers() const { return team_.workers_; }
  // How long it waited for others, but for the usual few microseconds.
  int64_t waited_ns() const { return waited_ns_; }

  // Runs item(i) for every i in [0, items), each on exactly one worker. When it returns, all of them are complete.
  // `reversed` walks every share from its end: what the last stage used last is still in the cache.
  template <class Item>
  void stage(int64_t items, bool reversed, Item&& item) {
    if (team_.workers_ == 1) {
      for (int64_t i = 0; i < items; ++i) item(reversed ? items - 1 - i : i);
      return;
    }
    ++stage_;
    target_ += items;
    if (!run_share(index_, items, reversed, item)) return;
    for (int spin = 0; spin < kMoment; ++spin) {
      if (all_finished()) return;
      relax();
    }
    for (int v = 1; v < team_.workers_; ++v)
      if (!run_share((index_ + v) % team_.workers_, items, reversed, item)) return;
    wait();
  }

 private:
  static constexpr int kMoment = 16, kSpins = 1000;

  // Runs what is left of a share. False if the others have gone on to a later stage.
  template <class Item>
  bool run_share(int owner, int64_t items, bool reversed, Item&& item) {
    const int64_t lo = owner * items / team_.workers_, hi = (owner + 1) * items / team_.workers_;
    std::atomic<uint64_t>& claim = team_.members_[owner].claim;
    int64_t ran = 0;
    uint64_t seen = claim.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t stage = seen >> 32;
      if (stage > stage_) return false;
      const int64_t next = stage == stage_ ? int64_t(seen & 0xffffffffu) : 0;
      if (next >= hi - lo) break;
      if (!claim.compare_exchange_weak(seen, (stage_ << 32) | uint64_t(next + 1), std::memory_order_acq_rel,
                                       std::memory_order_relaxed))
        continue;
      item(reversed ? hi - 1 - next : lo + next);
      ++ran;
      seen = claim.load(std::memory_order_relaxed);
    }
    if (ran) {
      std::atomic<int64_t>& finished = team_.members_[index_].finished;
      finished.store(finished.load(std::memory_order_relaxed) + ran, std::memory_order_release);
    }
    return true;
  }

  bool all_finished() const {
    int64_t sum = 0;
    for (int v = 0; v < team_.workers_; ++v) sum += team_.members_[v].finished.load(std::memory_order_acquire);
    return sum >= target_;
  }

  // Spins for some ten microseconds, then gives the core away: whoever is being waited for may need it.
  void wait() {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (all_finished()) return;
      relax();
    }
    const int64_t begin = now_ns();
    while (!all_finished()) sched_yield();
    waited_ns_ += now_ns() - begin;
  }

  Team& team_;
  int index_;
  uint64_t stage_ = 0;
  int64_t target_ = 0;
  int64_t waited_ns_ = 0;
};

}  // namespace fastgru
