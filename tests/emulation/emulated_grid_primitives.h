// Implements csrc/cuda/grid_primitives.cuh on the CPU, with relaxed memory order.
//
// A stored word stays invisible for a while. Words become visible in any order, except that those of one thread before
// its fence do so before those after it. A load may return an old value, but none older than one that this thread has
// already loaded there, nor than the one visible at its last fence. (A fence that makes all visible words binding is
// stronger than the GPU's, which binds only the words ordered before those already loaded.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulated_primitives.h"

namespace fastgru {
namespace cuda {

// A fault injected into a run. Each but the last two concerns one block, the first of the grid.
enum class GridFault {
  none,
  missing_wait,   // uses words that are still empty
  lost_word,      // one word never becomes visible
  never_cleared,  // words of earlier steps are not reset
  no_fence_after_setting,
  no_fence_before_looking,
};

struct Exchange {
  struct Set {
    int fences;
    uint32_t* at;
    bool lazy;  // becomes visible only when nearly all threads poll; in small grids, where that is soon
    std::vector<uint32_t> words;
  };
  struct Version {
    uint64_t time;
    uint32_t word;
  };

  // `words` is the exchange, of a grid of so many blocks along x, and threads in all and in each block.
  Exchange(uint64_t seed, GridFault fault, std::vector<uint32_t>& words, int blocks_x, int threads, int in_block)
      : random(seed),
        fault(fault),
        lost(1 + seed % 11),
        first(words.data()),
        blocks_x(blocks_x),
        in_block(in_block),
        waiting(threads),
        fences(threads),
        horizon(threads),
        last_seen(threads),
        history(words.size()) {
    const int odds[] = {1, 4, 16};
    delay = odds[seed % 3];
  }

  static Exchange*& current() {
    static Exchange* exchange = nullptr;
    return exchange;
  }

  int self() const { return (machine().block_y() * blocks_x + machine().block_x()) * in_block + machine().thread(); }
  bool is_victim() const { return machine().block_x() == 0 && machine().block_y() == 0; }

  void store(uint32_t* at, const uint32_t* words, int n) {
    for (int i = 0; i < n; ++i) machine().check_global(at + i, 4, true);
    const bool empty = words[0] == 0xffffffff;
    if (fault == GridFault::never_cleared && is_victim() && empty) return;
    if (fault == GridFault::lost_word && is_victim() && !empty && --lost == 0) return;
    idle = 0;
    std::vector<Set>& sets = waiting[self()];
    if (sets.empty()) active.push_back(self());
    sets.push_back({fences[self()], at, empty && waiting.size() <= 1024 && random() % 32 == 0, {words, words + n}});
    machine().maybe_yield();
  }

  void load(const uint32_t* at, uint32_t* words, int n) {
    // The machine detects no deadlock here: polling threads never wait.
    if (++idle > 4000 * waiting.size()) machine().fail("looked for a word that never came");
    machine().maybe_yield();
    if (!active.empty() && random() % delay == 0) make_one_visible();
    for (int i = 0; i < n; ++i) {
      machine().check_global(at + i, 4, false);
      const std::vector<Version>& versions = history[at + i - first];
      if (versions.empty()) {
        words[i] = at[i];
        continue;
      }
      size_t& seen = last_seen[self()][at + i - first];
      while (seen + 1 < versions.size() && versions[seen + 1].time <= horizon[self()]) ++seen;
      // Some threads keep loading an old number.
      const bool holds = self() % 8 == 0 && versions[seen].word != 0xffffffff;
      seen += random() % (holds ? 64 : 2) != 0 ? 0 : random() % (versions.size() - seen);
      words[i] = versions[seen].word;
    }
  }

  void fence() {
    if (fault != GridFault::no_fence_after_setting) ++fences[self()];
    if (fault != GridFault::no_fence_before_looking) horizon[self()] = now;
  }

  // Makes one of the stored words visible, or none.
  void make_one_visible() {
    const size_t at = random() % active.size();
    std::vector<Set>& sets = waiting[active[at]];
    // Only stores before the thread's next fence; those to one address keep their order.
    size_t end = 0;
    while (end < sets.size() && sets[end].fences == sets[0].fences) ++end;
    size_t index = random() % end;
    for (size_t i = 0; i < index; ++i)
      if (sets[i].at == sets[index].at) index = i;
    if (sets[index].lazy && idle < 100 * waiting.size()) return;
    idle = 0;
    const Set set = sets[index];
    sets.erase(sets.begin() + long(index));
    if (sets.empty()) {
      active[at] = active.back();
      active.pop_back();
    }
    ++now;
    for (size_t i = 0; i < set.words.size(); ++i) {
      std::vector<Version>& versions = history[set.at + i - first];
      if (versions.empty()) versions.push_back({0, set.at[i]});
      versions.push_back({now, set.words[i]});
      set.at[i] = set.words[i];
    }
  }

  emulation::Random random;
  GridFault fault;
  int lost;
  uint64_t delay, now = 0, idle = 0;
  uint32_t* first;
  int blocks_x, in_block;
  std::vector<int> active;  // the threads with stores that are not visible yet
  // Of each thread:
  std::vector<std::vector<Set>> waiting;
  std::vector<int> fences;
  std::vector<uint64_t> horizon;
  std::vector<std::unordered_map<size_t, size_t>> last_seen;
  // Of each word: its values since the first store.
  std::vector<std::vector<Version>> history;
};

inline void load_relaxed(const uint32_t* from, uint32_t (&words)[2]) { Exchange::current()->load(from, words, 2); }

template <int N>
inline void store_relaxed(uint32_t* to, const uint32_t (&words)[N]) {
  Exchange::current()->store(to, words, N);
}

inline void fence_gpu() { Exchange::current()->fence(); }

inline bool all_lanes(bool mine) {
  const Exchange& exchange = *Exchange::current();
  if (exchange.fault == GridFault::missing_wait && exchange.is_victim()) mine = true;
  return machine().warp_collective<bool, bool>(mine, [](const bool* in, bool* out) {
    const bool all = std::all_of(in, in + 32, [](bool one) { return one; });
    std::fill(out, out + 32, all);
  });
}

}  // namespace cuda
}  // namespace fastgru
