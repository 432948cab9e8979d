// A pool thread that wakes up on the caller's core goes to another one, by narrowing its affinity for a moment. The
// system would leave it there, even with another core idle, until its next balancing some milliseconds later, and the
// caller would wait for both turns.
//
// The mask is read, narrowed and restored: a change that somebody else makes in between is lost. So nothing is done
// where somebody decides about cores: FASTGRU_MOVE_THREADS=0, OpenMP's binding in the environment, or a mask that
// leaves out a core of the machine (taskset, a container's cpuset, os.sched_setaffinity).
#include "affinity.h"

#include <strings.h>
#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

namespace fastgru {

#if defined(__linux__)

namespace {

bool set(const char* name, const char* off) {
  const char* value = std::getenv(name);
  return value && *value && strcasecmp(value, off) != 0;
}

bool may_move() {
  static const bool may = [] {
    const char* wanted = std::getenv("FASTGRU_MOVE_THREADS");
    return !(wanted && std::strcmp(wanted, "0") == 0) && !set("OMP_PROC_BIND", "false") && !set("OMP_PLACES", "") &&
           !set("GOMP_CPU_AFFINITY", "") && !set("KMP_AFFINITY", "disabled");
  }();
  return may;
}

}  // namespace

int core_to_avoid() { return may_move() ? sched_getcpu() : -1; }

void leave_core(int core, int threads) {
  if (core < 0 || sched_getcpu() != core) return;
  static const long cores = sysconf(_SC_NPROCESSORS_ONLN);
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < cores || cores < threads) return;
  cpu_set_t others = all;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) (void)sched_setaffinity(0, sizeof all, &all);
}

#else

int core_to_avoid() { return -1; }
void leave_core(int, int) {}

#endif

}  // namespace fastgru
