// Moves pool threads off the core of the thread that called them.
#pragma once

namespace fastgru {

// The core that the calling thread runs on, or -1 where it should not be avoided: see affinity.cpp.
int core_to_avoid();
// Moves the calling thread to another core if it runs on `core` and may use every core of a machine with `threads`.
void leave_core(int core, int threads);

}  // namespace fastgru
