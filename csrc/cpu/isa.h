// The engine of this process. The best one that the processor and the operating system support is used;
// FASTGRU_CPU_ISA or set_engine() forces another. A name that is unknown or not supported here is an error.
#pragma once

#include <string>

#include "kernel_table.h"

namespace fastgru {

const Engine& current_engine();               // throws std::runtime_error on a bad FASTGRU_CPU_ISA
const Kernels& current_kernels(DType dtype);  // of the current engine
std::string usable_engines();                 // names, best first, separated by commas
void set_engine(const std::string& name);     // "auto" goes back to the best one

}  // namespace fastgru
