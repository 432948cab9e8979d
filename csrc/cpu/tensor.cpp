#include "tensor.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "kernels/team.h"

namespace fastgru {
namespace {

// A pool that has not had work for this long may be asleep.
constexpr int64_t kPauseNs = 1'000'000;
thread_local int64_t last_end_ns = 0;  // of the last region

int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// A thread that wakes up on `core`, which is the caller's, goes to another one, by narrowing its affinity for a moment.
// The system would leave it there, even with another core idle, until it looks again some milliseconds later.
void leave_core(int core, int threads) {
#if defined(__linux__)
  cpu_set_t all;
  if (sched_getcpu() != core || sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < threads) return;
  cpu_set_t others = all;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) (void)sched_setaffinity(0, sizeof all, &all);
#endif
}

// When the caller comes to the end of a region, all work is done. Whoever is missing has no core yet, or it is the
// caller's, which naps give away: at the pool's own barrier the caller would keep it, spinning.
void nap_until_zero(const std::atomic<int64_t>& missing) {
  constexpr int kSpins = 1000;
  for (int spin = 0; missing.load(std::memory_order_acquire); ++spin) {
    if (spin < kSpins)
      relax();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(1));
  }
}

void run_parallel(int n, void (*body)(int, void*), void* arg) {
  const int core = current_core();
  const bool asleep = now_ns() - last_end_ns > kPauseNs;
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

// Where another process holds a core, the thread there comes and goes, and a call waits for it longer than it would
// take alone. A call that waits as long as only a core taken away explains, or the second in a row of which a good part
// is waiting, makes the thread work alone for as long as the wait was; for twice as long if that comes soon after the
// last time, up to eight times. A pool that is asleep, after a pause or some time alone, takes a while to come back:
// that counts only where it takes as long as that, and the second time. (Results do not depend on the number of
// threads.)
constexpr int64_t kUsualWaitNs = 50'000, kTakenNs = 1'000'000, kPartOfCall = 4, kMostTimes = 8;
thread_local int64_t alone_until_ns = 0, alone_ns = 0, alone_times = 1;
thread_local bool waited_before = false;

void note_wait(int64_t waited_ns, int64_t total_ns) {
  const int64_t end = now_ns(), begin = end - total_ns;
  const bool asleep = begin - last_end_ns > kPauseNs, taken = waited_ns > kTakenNs;
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

// OpenMP keeps a pool for every thread that has run a region, whoever's it was. Of that thread a child of fork has a
// copy, of the pool's threads none: a region would wait for them for ever. So the one thread that comes through a fork
// works alone, and so does the one that comes through the next; threads that the child starts make pools of their own.
thread_local bool forked = false;
[[maybe_unused]] const int watches_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

constexpr size_t kLargePage = size_t(1) << 21;

// Tests set this: memory that nothing has been written to then reads as NaN.
std::atomic<bool> poison{false};

// Fresh memory costs a page fault per 4 KiB, more than the arithmetic on it. Large pages, where the system gives them
// on request, cost a hundredth of that, and a walk through them does not wait for address translation.
void prefer_large_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  // Advice: where it is not taken, nothing is lost.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

constexpr size_t kKept = size_t(64) << 20, kFirst = size_t(1) << 17;

}  // namespace

DType tensor_dtype(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "fastgru: the cpu backend computes in float32, float64, bfloat16 and float16 only");
  }
}

Parallel torch_threads() {
  const bool alone = forked || (alone_until_ns > 0 && now_ns() < alone_until_ns);
  return {alone ? 1 : int(torch::stable::get_num_threads()), run_parallel, note_wait};
}

namespace {

// What torch's last exception on this thread said. Torch has a function for it since 2.13; this library needs 2.10.
const char* torch_error() {
  using What = const char* (*)();
  static const auto what = reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return what ? what() : "DefaultCPUAllocator: can't allocate memory";
}

}  // namespace

Tensor strided_tensor(int32_t dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle = nullptr;
  // The sizes are sound: what can fail is the allocator, whose own words these are.
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype,
                                           aoti_torch_device_type_cpu(), 0, &handle) == 0,
                  torch_error());
  Tensor t(handle);
  const size_t bytes = t.numel() * t.element_size();
  prepare_fresh(t.mutable_data_ptr(), bytes);
  if (poison.load(std::memory_order_relaxed)) std::memset(t.mutable_data_ptr(), 0xff, bytes);
  return t;
}

Tensor contiguous_tensor(int32_t dtype, const std::vector<int64_t>& size) {
  std::vector<int64_t> strides(size.size());
  int64_t elements = 1;
  for (size_t i = size.size(); i-- > 0; elements *= size[i] ? size[i] : 1) strides[i] = elements;
  return strided_tensor(dtype, size, strides);
}

void prepare_fresh(void* memory, size_t bytes) {
  if (bytes >= 2 * kLargePage) prefer_large_pages(memory, bytes);
}

void cpu_set_poison(bool on) { poison.store(on); }

Slab::Slab(size_t bytes) {
  // In large pages, if it fills a good part of one: packed weights then lie evenly over the sets of a cache too.
  const bool large = bytes >= kLargePage / 4;
  const size_t unit = large ? kLargePage : 4096;
  bytes_ = (bytes + unit - 1) / unit * unit;
  mapped_ = bytes_ + (large ? kLargePage : 0);
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    // Torch's allocator has the words for it. If it still finds the memory, all is well too.
    fallback_ = contiguous_tensor(aoti_torch_dtype_uint8(), {int64_t(bytes_)});
    data_ = static_cast<char*>(fallback_->mutable_data_ptr());
    return;
  }
  mapping_ = memory;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + unit - 1) / unit * unit;
  data_ = reinterpret_cast<char*>(begin);
  if (large) prefer_large_pages(data_, bytes_);
}

Slab& Slab::operator=(Slab&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  std::swap(fallback_, other.fallback_);
  return *this;
}

Slab::~Slab() {
  if (mapping_) munmap(mapping_, mapped_);
}

Arena::Kept& Arena::kept() {
  thread_local Kept kept;
  return kept;
}

Arena::Arena() : slab_(std::move(kept().slab)), wanted_(kept().wanted) {}

Arena::~Arena() {
  // What did not fit shows how large the slab should be.
  kept().wanted = used_ > kKept ? 0 : std::max(wanted_, used_);
  if (used_ <= slab_.bytes() && slab_.bytes() <= kKept) kept().slab = std::move(slab_);
}

void* Arena::allocate(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (!slab_.data()) {
    // Not asked for again by the next call, if there is no memory for it.
    const size_t wanted = std::exchange(wanted_, 0);
    slab_ = Slab(std::max({wanted, kFirst, bytes}));
    wanted_ = wanted;
  }
  const Slab* slab = overflow_.empty() ? &slab_ : &overflow_.back();
  if (at_ + bytes > slab->bytes()) {
    // With room for what comes next, because a slab of its own takes a large page at the least.
    slab = &overflow_.emplace_back(std::max(bytes, std::min(used_, kLargePage)));
    at_ = 0;
  }
  void* result = slab->data() + at_;
  at_ += bytes, used_ += bytes;
  if (poison.load(std::memory_order_relaxed)) std::memset(result, 0xff, bytes);
  return result;
}

}  // namespace fastgru
