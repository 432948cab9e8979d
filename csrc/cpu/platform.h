// Queries of the processor and the operating system.
#pragma once

#include <cstdint>

namespace fastgru {

// Bytes of the second-level cache of one core.
int64_t l2_bytes();
// A clock that never goes back.
int64_t now_ns();
// How often the system has taken the core from this thread.
int64_t preemptions();
// True on a thread that came through a fork: it has no pool of threads any more.
bool forked_thread();

}  // namespace fastgru
