// Scratch memory comes straight from the system, in large pages where it fills some, and stays with its thread.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "tensor.h"

namespace fastgru {
namespace {

constexpr size_t kLargePage = size_t(1) << 21;

// Set by tests: memory that nothing has been written to then reads as NaN.
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

constexpr size_t kMostKept = size_t(64) << 20, kFirst = size_t(1) << 17;  // bytes of a slab

// What a thread keeps between calls. In a list that only grows, whose members pass from ended threads to new ones: no
// lock, which a child of fork could find taken for ever.
struct Kept {
  std::atomic<Slab*> slab{nullptr};
  size_t wanted = 0;  // of the next slab
  std::atomic<bool> owned{true};
  Kept* next = nullptr;
};
std::atomic<Kept*> all_kept{nullptr};

Kept* own_kept() {
  for (Kept* each = all_kept.load(std::memory_order_acquire); each; each = each->next) {
    bool owned = false;
    if (each->owned.compare_exchange_strong(owned, true)) return each;
  }
  Kept* const created = new Kept;
  created->next = all_kept.load(std::memory_order_relaxed);
  while (!all_kept.compare_exchange_weak(created->next, created, std::memory_order_release)) {
  }
  return created;
}

Kept& kept() {
  struct Owner {
    Kept* kept = own_kept();
    ~Owner() {
      delete kept->slab.exchange(nullptr);
      kept->wanted = 0;
      kept->owned.store(false, std::memory_order_release);
    }
  };
  thread_local Owner owner;
  return *owner.kept;
}

}  // namespace

void prepare_fresh(void* memory, size_t bytes) {
  if (bytes >= 2 * kLargePage) prefer_large_pages(memory, bytes);
}

void cpu_set_poison(bool on) { poison.store(on); }

bool poisoned() { return poison.load(std::memory_order_relaxed); }

Slab::Slab(size_t bytes) {
  // In large pages, if it fills a good part of one: packed weights then lie evenly over the sets of a cache too.
  const bool large = bytes >= kLargePage / 4;
  const size_t unit = large ? kLargePage : 4096;
  bytes_ = (bytes + unit - 1) / unit * unit;
  mapped_ = bytes_ + (large ? kLargePage : 0);
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    // Torch's allocator reports the error, unless it still finds the memory.
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

Arena::Arena() : slab_(kept().slab.exchange(nullptr)), wanted_(kept().wanted) {}

Arena::~Arena() {
  // What did not fit shows how large the slab should be.
  kept().wanted = used_ > kMostKept ? 0 : std::max(wanted_, used_);
  if (slab_ && used_ <= slab_->bytes() && slab_->bytes() <= kMostKept)
    slab_.reset(kept().slab.exchange(slab_.release()));
}

void* Arena::allocate(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (!slab_) {
    // Not asked for again by the next call, if there is no memory for it.
    const size_t wanted = std::exchange(wanted_, 0);
    slab_ = std::make_unique<Slab>(std::max({wanted, kFirst, bytes}));
    wanted_ = wanted;
  }
  const Slab* slab = overflow_.empty() ? slab_.get() : &overflow_.back();
  if (at_ + bytes > slab->bytes()) {
    // With room for what comes next, because a slab of its own takes a large page at the least.
    slab = &overflow_.emplace_back(std::max(bytes, std::min(used_, kLargePage)));
    at_ = 0;
  }
  void* result = slab->data() + at_;
  at_ += bytes, used_ += bytes;
  if (poisoned()) std::memset(result, 0xff, bytes);
  return result;
}

void cpu_release_memory() {
  for (Kept* each = all_kept.load(std::memory_order_acquire); each; each = each->next)
    delete each->slab.exchange(nullptr);
}

}  // namespace fastgru
