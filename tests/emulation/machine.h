// Emulates the CUDA features that the kernels use, on the CPU. Every thread of the grid is a fiber, scheduled in an
// order drawn from a seed; messages between blocks are delayed arbitrarily. A run ends with an error on a deadlock, on
// an access outside of the kernel's arrays, and on a message without a barrier or to a block that has ended.
//
// Data races end a run with an error, too: two accesses to a word of shared memory, one of them a write, that no
// barrier or message orders. Every warp has a vector clock, which barriers and messages pass on; every word records its
// last accesses. So a missing wait is found whether or not it changed the result. Lanes of a warp count as one.
//
// Not modelled: caches and write buffers, and with them fences; global memory, except for its bounds; the rounding of
// the GPU's own instructions.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

// A fault injected into a run, to test that it is detected. Each concerns one block, `victim_`, the last of the first
// cluster.
enum class Fault {
  none,
  wrong_phase,       // waits for the other parity
  missing_wait,      // does not wait for messages
  lost_message,      // one message is never delivered
  early_delivery,    // expects half of the bytes that are sent
  no_block_barrier,  // does not wait for its own threads
  no_cluster_start,  // does not wait for the other blocks at the start
};

struct Region {
  uintptr_t begin, end;
  bool writable;
};

// splitmix64: fast, because a number is drawn for every access.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t operator()() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

 private:
  uint64_t state_;
};

struct Options {
  uint64_t seed = 0;
  Fault fault = Fault::none;
};

struct Grid {
  int x = 1, y = 1;
  int cluster = 1;  // blocks next to each other along x
  int threads = 32;
  int shared_bytes = 0;
};

class Machine {
 public:
  Machine(const Grid& grid, const Options& options, std::vector<Region> memory)
      : grid_(grid), options_(options), memory_(std::move(memory)), random_(options.seed) {
    // The delay of messages and the unfairness of scheduling differ from seed to seed.
    const double eagerness[] = {0.0, 0.001, 0.05, 1.0};
    eagerness_ = eagerness[options.seed % 4];
    const int candidates[] = {1, 2, 8};
    candidates_ = candidates[options.seed % 3];
    victim_ = grid.cluster - 1;
    lost_ = 1 + options.seed % 7;
  }

  // The machine that runs now.
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  // Runs the whole grid, all blocks at once. Throws std::runtime_error.
  void run(const std::function<void()>& body) {
    const int blocks = grid_.x * grid_.y, warps = grid_.threads / 32;
    blocks_.resize(blocks);
    for (int b = 0; b < blocks; ++b) {
      blocks_[b].shared.assign(grid_.shared_bytes, 0xff);  // NaN in every format
      blocks_[b].warps.resize(warps);
      for (Warp& warp : blocks_[b].warps) warp.priority = random_();
    }
    clusters_.assign(blocks / grid_.cluster, ThreadBarrier{});
    // Each warp counts its own time, each barrier its phases.
    clock_size_ = blocks * (warps + MOST_BARRIERS);
    for (int w = 0; w < blocks * warps; ++w) {
      clocks_.emplace_back(clock_size_, 0);
      clocks_[w][w] = 1;
    }
    for (Block& block : blocks_) block.words.resize(grid_.shared_bytes / 4);
    body_ = &body;
    fibers_.resize(size_t(blocks) * grid_.threads);
    const Stacks stacks(fibers_.size() * STACK);
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.block = int(i) / grid_.threads;
      fiber.thread = int(i) % grid_.threads;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.memory + i * STACK;
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
      runnable_.push_back(int(i));
    }
    Machine* outer = current();
    current() = this;
    schedule();
    current() = outer;
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // --- Called by the threads of the kernel

  int thread() const { return fibers_[running_].thread; }
  int block() const { return fibers_[running_].block; }
  int block_x() const { return block() % grid_.x; }
  int block_y() const { return block() / grid_.x; }
  int rank() const { return block_x() % grid_.cluster; }

  // Global memory: ends the run unless [p, p + bytes) lies in one array.
  void check_global(const void* p, size_t bytes, bool write) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    for (const Region& region : memory_)
      if (at >= region.begin && at + bytes <= region.end && (region.writable || !write)) return;
    fail(write ? "a write outside of the outputs" : "a read outside of the arrays");
  }

  void load_shared(uint32_t offset, void* to, size_t bytes) {
    maybe_yield();
    std::memcpy(to, shared_of(block(), offset, bytes), bytes);
    for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
      Word& word = blocks_[block()].words[at];
      if (word.writer >= 0 && word.written > clock()[word.writer]) fail("reads a word whose write it need not see");
      bool known = false;
      for (auto& [reader, time] : word.reads)
        if (reader == warp()) time = clock()[warp()], known = true;
      if (!known) word.reads.emplace_back(warp(), clock()[warp()]);
    }
  }

  void store_shared(uint32_t offset, const void* from, size_t bytes) {
    maybe_yield();
    std::memcpy(shared_of(block(), offset, bytes), from, bytes);
    const std::string race = record_write(block(), offset, bytes, clock(), warp(), clock()[warp()]);
    if (!race.empty()) fail(race);
  }

  // Sometimes lets other threads run first.
  void maybe_yield() {
    if (random_() % 16 == 0) yield_now();
  }

  void sync_threads() {
    if (options_.fault == Fault::no_block_barrier && block() == victim_) return;
    arrive_and_wait(blocks_[block()].barrier_of_threads, grid_.threads, "the threads of its block");
  }

  void sync_cluster() {
    if (options_.fault == Fault::no_cluster_start && block() == victim_) return;
    arrive_and_wait(clusters_[block() / grid_.cluster], grid_.threads * grid_.cluster, "the blocks of its cluster");
  }

  void sync_grid() { arrive_and_wait(all_, int(fibers_.size()), "the blocks of the grid"); }

  void barrier_init(uint32_t offset, uint32_t arrivals) {
    shared_of(block(), offset, 8);
    auto& barriers = blocks_[block()].barriers;
    const int component = int(clocks_.size()) + block() * MOST_BARRIERS + int(barriers.size());
    if (barriers.size() == MOST_BARRIERS) fail("more barriers than the machine has");
    Barrier barrier{component, arrivals, arrivals};
    barrier.next.assign(clock_size_, 0);
    barrier.released.assign(clock_size_, 0);
    if (!barriers.emplace(offset, std::move(barrier)).second) fail("barrier made twice");
  }

  void barrier_arrive_and_expect(uint32_t offset, uint32_t bytes) {
    if (options_.fault == Fault::early_delivery && block() == victim_) bytes /= 2;
    Barrier& barrier = barrier_at(block(), offset);
    if (barrier.pending == 0) fail("more arrivals at a barrier than it was made for");
    barrier.bytes += bytes;
    --barrier.pending;
    release_clock(barrier.next);
    end_phase(barrier);
  }

  void barrier_wait(uint32_t offset, uint32_t parity) {
    if (parity > 1) fail("a parity is 0 or 1");
    if (block() == victim_) {
      if (options_.fault == Fault::missing_wait) return;
      if (options_.fault == Fault::wrong_phase) parity ^= 1;
    }
    // Tested again when the thread is scheduled: by then another phase may have passed, as on the GPU.
    for (Barrier* b; (b = &barrier_at(block(), offset))->phase % 2 == parity;) wait(b->waiting, "a message");
    join(clock(), barrier_at(block(), offset).released);
  }

  void send(int peer, uint32_t offset, const uint32_t (&words)[4], uint32_t barrier) {
    if (peer < 0 || peer >= grid_.cluster) fail("a message to a block that is not in the cluster");
    const int target = block() / grid_.cluster * grid_.cluster + peer;
    shared_of(target, offset, 16);
    Message message{target, offset, barrier, {}, false, Clock(clock_size_)};
    std::memcpy(message.bytes, words, 16);
    release_clock(message.clock);
    if (options_.fault == Fault::lost_message && block() == victim_ && --lost_ == 0) return;
    messages_.push_back(std::move(message));
    maybe_yield();
  }

  // A collective operation of a warp: when all 32 lanes have arrived, calls work(values of all lanes, results) once,
  // and returns this lane's result.
  template <typename In, typename Out, typename Work>
  Out warp_collective(const In& in, Work work) {
    static_assert(sizeof(In) <= MAX_VALUE && sizeof(Out) <= MAX_VALUE);
    Warp& warp = blocks_[block()].warps[thread() / 32];
    const int lane = thread() % 32;
    std::memcpy(warp.in[lane], &in, sizeof(In));
    if (++warp.arrived == 32) {
      In ins[32];
      Out outs[32];
      for (int i = 0; i < 32; ++i) std::memcpy(&ins[i], warp.in[i], sizeof(In));
      work(ins, outs);
      for (int i = 0; i < 32; ++i) std::memcpy(warp.out[i], &outs[i], sizeof(Out));
      warp.arrived = 0;
      wake(warp.waiting);
    } else {
      wait(warp.waiting, "the lanes of its warp");
    }
    Out out;
    std::memcpy(&out, warp.out[lane], sizeof(Out));
    return out;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("block " + std::to_string(block()) + ", thread " + std::to_string(thread()) + ": " + what);
  }

 private:
  static constexpr size_t STACK = 64 * 1024;
  static constexpr size_t MAX_VALUE = 64;
  static constexpr int MOST_BARRIERS = 4;  // of a block

  // Virtual memory: untouched pages of a stack cost nothing.
  struct Stacks {
    explicit Stacks(size_t bytes) : bytes(bytes) {
      void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      memory = static_cast<char*>(p);
    }
    ~Stacks() { munmap(memory, bytes); }
    Stacks(const Stacks&) = delete;
    size_t bytes;
    char* memory;
  };

  // A context starts a fiber; later switches are jumps, which need no system call.
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool begun = false;
    int block, thread;
    const char* waits_for = nullptr;
  };

  struct Warp {
    uint64_t priority = 0;
    int arrived = 0;
    std::vector<int> waiting;
    unsigned char in[32][MAX_VALUE], out[32][MAX_VALUE];
  };

  struct ThreadBarrier {
    int arrived = 0;
    std::vector<int> waiting;
    std::vector<int> warps;
  };

  using Clock = std::vector<uint32_t>;

  struct Barrier {
    int component;  // of the clocks: counts its phases
    uint32_t arrivals, pending;
    int64_t bytes = 0;  // still to come; negative while more has come than is expected yet
    uint32_t phase = 0;
    std::vector<int> waiting;
    Clock next, released;  // the clocks that a wait for the current phase, and for the last one, passes on
  };

  // The last accesses to four bytes of shared memory, and their times by the accessing warps' own clocks.
  struct Word {
    int writer = -1;
    uint32_t written = 0;
    std::vector<std::pair<int, uint32_t>> reads;  // since
  };

  struct Block {
    std::vector<unsigned char> shared;
    std::vector<Word> words;
    std::vector<Warp> warps;
    std::map<uint32_t, Barrier> barriers;
    ThreadBarrier barrier_of_threads;
    int finished = 0;
  };

  struct Message {
    int block;
    uint32_t offset, barrier;
    unsigned char bytes[16];
    bool written;
    Clock clock;
  };

  static void enter() {
    Machine& machine = *current();
    const int self = machine.running_;
    try {
      (*machine.body_)();
      ++machine.blocks_[machine.fibers_[self].block].finished;
      machine.fibers_[self].waits_for = nullptr;
      --machine.alive_;
    } catch (const std::exception& error) {
      machine.error_ = error.what();
    }
    _longjmp(machine.scheduler_, 1);
  }

  void schedule() {
    alive_ = int(fibers_.size());
    while (alive_ > 0 && error_.empty()) {
      if (!messages_.empty() && (runnable_.empty() || uniform() < eagerness_)) {
        deliver_one();
      } else if (runnable_.empty()) {
        error_ = deadlock();
      } else {
        running_ = choose();
        resume(fibers_[running_]);
      }
    }
    while (error_.empty() && !messages_.empty()) deliver_one();
  }

  double uniform() { return double(random_() >> 11) * 0x1p-53; }

  // Of a few threads drawn, the one whose warp has the highest priority; priorities change now and then.
  int choose() {
    size_t best = 0;
    uint64_t most = 0;
    for (int i = 0; i < candidates_; ++i) {
      const size_t at = random_() % runnable_.size();
      const Fiber& fiber = fibers_[runnable_[at]];
      uint64_t& priority = blocks_[fiber.block].warps[fiber.thread / 32].priority;
      if (random_() % 512 == 0) priority = random_();
      if (i == 0 || priority > most) best = at, most = priority;
    }
    const int chosen = runnable_[best];
    runnable_[best] = runnable_.back();
    runnable_.pop_back();
    return chosen;
  }

  void deliver_one() {
    const size_t at = random_() % messages_.size();
    Message& message = messages_[at];
    const int target = message.block;
    Block& block = blocks_[target];
    const auto found = block.barriers.find(message.barrier);
    std::string what;
    if (block.finished == grid_.threads) {
      what = "after its end";
    } else if (found == block.barriers.end()) {
      what = "before its barrier was initialised";
    } else if (!message.written) {
      std::memcpy(block.shared.data() + message.offset, message.bytes, 16);
      message.written = true;
      Barrier& barrier = found->second;
      what = record_write(target, message.offset, 16, message.clock, barrier.component, barrier.phase + 1);
    } else {
      found->second.bytes -= 16;
      join(found->second.next, message.clock);
      end_phase(found->second);
      std::swap(message, messages_.back());
      messages_.pop_back();
    }
    if (!what.empty()) error_ = "a message came to block " + std::to_string(target) + " " + what;
  }

  // Records a write by a writer with `clock`. Returns a message if the write is not ordered after all earlier accesses.
  std::string record_write(int block, uint32_t offset, size_t bytes, const Clock& clock, int writer, uint32_t time) {
    for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
      Word& word = blocks_[block].words[at];
      if (word.writer >= 0 && word.written > clock[word.writer])
        return "writes a word that another write may still reach";
      for (const auto& [reader, read] : word.reads)
        if (read > clock[reader]) return "writes a word that may still be read";
      word.writer = writer;
      word.written = time;
      word.reads.clear();
    }
    return "";
  }

  int warp() const { return running_ / 32; }
  Clock& clock() { return clocks_[warp()]; }

  static void join(Clock& to, const Clock& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

  // Release: passes on this warp's clock, and advances it.
  void release_clock(Clock& to) {
    join(to, clock());
    ++clock()[warp()];
  }

  void end_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    barrier.next[barrier.component] = ++barrier.phase;
    barrier.released = barrier.next;
    wake(barrier.waiting);
  }

  void arrive_and_wait(ThreadBarrier& barrier, int all, const char* what) {
    if (thread() % 32 == 0) barrier.warps.push_back(warp());
    if (++barrier.arrived == all) {
      barrier.arrived = 0;
      Clock everything(clock_size_);
      for (int w : barrier.warps) join(everything, clocks_[w]);
      for (int w : barrier.warps) {
        clocks_[w] = everything;
        ++clocks_[w][w];
      }
      barrier.warps.clear();
      wake(barrier.waiting);
    } else {
      wait(barrier.waiting, what);
    }
  }

  void wait(std::vector<int>& waiting, const char* what) {
    waiting.push_back(running_);
    fibers_[running_].waits_for = what;
    leave();
  }

  void wake(std::vector<int>& waiting) {
    runnable_.insert(runnable_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }

  void yield_now() {
    runnable_.push_back(running_);
    leave();
  }

  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }

  __attribute__((noinline)) void leave() {
    if (_setjmp(fibers_[running_].place) == 0) _longjmp(scheduler_, 1);
  }

  Barrier& barrier_at(int block, uint32_t offset) {
    const auto found = blocks_[block].barriers.find(offset);
    if (found == blocks_[block].barriers.end()) fail("a barrier that was not initialised");
    return found->second;
  }

  unsigned char* shared_of(int block, uint32_t offset, size_t bytes) {
    if (offset + bytes > blocks_[block].shared.size()) fail("shared memory out of bounds");
    if (offset % bytes != 0) fail("shared memory not aligned");
    return blocks_[block].shared.data() + offset;
  }

  std::string deadlock() const {
    std::map<std::string, int> waiting;
    for (const Fiber& fiber : fibers_)
      if (fiber.waits_for != nullptr) ++waiting[fiber.waits_for];
    std::string text = "nothing can go on:";
    for (const auto& [what, threads] : waiting)
      text += " " + std::to_string(threads) + " threads wait for " + what + ";";
    return text;
  }

  const Grid grid_;
  const Options options_;
  const std::vector<Region> memory_;
  Random random_;
  double eagerness_;  // chance that a message moves on before the next thread does
  int candidates_;
  int victim_;
  int lost_;

  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<Block> blocks_;
  std::vector<Clock> clocks_;  // of the warps
  size_t clock_size_ = 0;
  std::vector<ThreadBarrier> clusters_;
  ThreadBarrier all_;
  std::vector<int> runnable_;
  std::vector<Message> messages_;
  int running_ = 0;
  int alive_ = 0;
  std::string error_;
};

}  // namespace emulation
