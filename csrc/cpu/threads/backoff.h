// Contention back-off: calls of a thread run alone for a while where another process holds a core.
#pragma once

#include <cstdint>

namespace fastgru {

// True where the thread's pool has not had work for so long that it may be asleep.
bool pool_may_sleep(int64_t now_ns);
// True while calls of this thread should run alone.
bool works_alone();
// Told after a region how long the caller waited for cores that something else had.
void note_wait(int64_t waited_ns, int64_t total_ns);

}  // namespace fastgru
