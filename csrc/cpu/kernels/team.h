// A team of workers that walks through the same list of stages together.
//
// A stage is a number of independent items; the next stage starts when all of them are done. Items are claimed, not
// assigned: a worker takes its own share first (so that it finds in its cache what it used in the last stage) and then
// what is left of the shares of others. Nobody ever waits for a worker that is not running, only for items that a
// worker has begun. So nothing is assumed of how many of the workers really run, and when: one after the other
// (a nested parallel region), late (a sleeping pool), or with a core taken away in the middle.
//
// Memory order: an item's writes are published by the release on `done` and seen through the acquire of whoever
// enters the next stage.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "gru_kernels.h"

namespace fastgru {

constexpr int kMaxWorkers = 256;

class Team {
 public:
  explicit Team(int workers) : workers_(workers) {
    for (int i = 0; i < workers; ++i) claims_[i].word.store(0, std::memory_order_relaxed);
  }

 private:
  friend class Worker;
  // One cache line each: high half the stage, low half the next item of this worker's share.
  struct alignas(64) Claim {
    std::atomic<uint64_t> word;
  };
  int workers_;
  alignas(64) std::atomic<int64_t> done_{0};
  Claim claims_[kMaxWorkers];
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
    int64_t mine = 0;
    for (int v = 0; v < team_.workers_; ++v) {
      const int owner = (index_ + v) % team_.workers_;
      const int64_t lo = owner * items / team_.workers_, hi = (owner + 1) * items / team_.workers_;
      std::atomic<uint64_t>& word = team_.claims_[owner].word;
      uint64_t seen = word.load(std::memory_order_relaxed);
      for (;;) {
        const uint64_t stage = seen >> 32;
        if (stage > stage_) return;  // the others finished this stage without us and went on
        const int64_t next = stage == stage_ ? int64_t(seen & 0xffffffffu) : 0;
        if (next >= hi - lo) break;
        if (!word.compare_exchange_weak(seen, (stage_ << 32) | uint64_t(next + 1), std::memory_order_acq_rel,
                                        std::memory_order_relaxed))
          continue;
        item(reversed ? hi - 1 - next : lo + next);
        ++mine;
        seen = word.load(std::memory_order_relaxed);
      }
    }
    if (mine) team_.done_.fetch_add(mine, std::memory_order_acq_rel);
    wait();
  }

 private:
  // Spins for some ten microseconds, then gives the core away: whoever is being waited for may need it.
  void wait() {
    const auto done = [&] { return team_.done_.load(std::memory_order_acquire) >= target_; };
    for (int spin = 0; spin < 1000; ++spin) {
      if (done()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    const int64_t begin = now_ns();
    while (!done()) sched_yield();
    waited_ns_ += now_ns() - begin;
  }

  Team& team_;
  int index_;
  uint64_t stage_ = 0;
  int64_t target_ = 0;
  int64_t waited_ns_ = 0;
};

}  // namespace fastgru
