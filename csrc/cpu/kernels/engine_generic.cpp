// The engine in 128-bit vectors, for any processor.
#include <new>

#include "attention_kernels.h"
#include "gru_kernels.h"
#include "team.h"

#define FASTGRU_ISA generic
#define FASTGRU_VECTOR_BYTES 16
#include "engine.inc"

const fastgru::Engine* fastgru::engine_generic() { return &generic::engine; }
