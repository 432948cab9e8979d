// Chooses the engine: by what the processor supports, FASTGRU_CPU_ISA or set_engine().
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace fastgru {

namespace {

struct Candidate {
  const Engine* engine;
  bool usable;
};

#if defined(__x86_64__)
const Engine* avx512_with_bf16() {
  static const Engine engine = [] {
    Engine e = *engine_avx512();
    const Engine& native = *engine_avx512_bf16();
    e.name = native.name;
    e.kernels[int(DType::bf16)] = native.kernels[int(DType::bf16)];
    return e;
  }();
  return &engine;
}
#endif

// Best first. __builtin_cpu_supports asks cpuid and, for the wide registers, xgetbv: the system must save them too.
std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{avx512_with_bf16(), bf16}, {engine_avx512(), avx512}, {engine_avx2(), avx2}, {engine_generic(), true}};
#else
  return {{engine_generic(), true}};
#endif
}

const Engine* find_engine(const std::string& name) {
  for (const Candidate& c : candidates())
    if (c.usable && (name == "auto" || name.empty() || name == c.engine->name)) return c.engine;
  throw std::runtime_error("FASTGRU_CPU_ISA: '" + name + "' is not an instruction set that fastgru can use on this " +
                           "processor; usable here: auto, " + usable_engines());
}

std::atomic<const Engine*> chosen{nullptr};

}  // namespace

const Kernels& current_kernels(DType dtype) { return current_engine().kernels[int(dtype)]; }

const Engine& current_engine() {
  const Engine* engine = chosen.load(std::memory_order_acquire);
  if (engine == nullptr) {
    const char* name = std::getenv("FASTGRU_CPU_ISA");
    engine = find_engine(name ? name : "auto");
    chosen.store(engine, std::memory_order_release);
  }
  return *engine;
}

std::string usable_engines() {
  std::string names;
  for (const Candidate& c : candidates())
    if (c.usable) names += (names.empty() ? "" : ",") + std::string(c.engine->name);
  return names;
}

void set_engine(const std::string& name) { chosen.store(find_engine(name), std::memory_order_release); }

}  // namespace fastgru
