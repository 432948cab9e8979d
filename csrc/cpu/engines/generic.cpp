// The engine in 128-bit vectors, for any processor.
#include <new>

#include "../attention/types.h"
#include "../gru/types.h"
#include "../kernel_table.h"
#include "../platform.h"
#include "../threads/phases.h"

#define FASTGRU_ISA generic
#define FASTGRU_SIMD "../simd/generic.inl.h"
#include "engine.inl.h"

const fastgru::Engine* fastgru::engine_generic() { return &generic::engine; }
