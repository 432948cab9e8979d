// Torch's threads, as the engines use them.
#pragma once

#include "../kernel_table.h"

namespace fastgru {

Parallel torch_threads();

}  // namespace fastgru
