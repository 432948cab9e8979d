// Registers the CPU implementations of the operators that fastgru/ops/*/schema.py defines, through torch's stable ABI:
// one library serves every Python and every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "cpu/attention/op.h"
#include "cpu/gru/op.h"
#include "cpu/memory.h"
#include "cpu/threads/backoff.h"

STABLE_TORCH_LIBRARY_IMPL(fastgru, CPU, m) {
  m.impl("cpu_gru_infer", TORCH_BOX(&fastgru::gru_infer));
  m.impl("cpu_gru_train", TORCH_BOX(&fastgru::gru_train));
  m.impl("cpu_gru_backward", TORCH_BOX(&fastgru::gru_backward));
  m.impl("cpu_attention_forward", TORCH_BOX(&fastgru::attention));
  m.impl("cpu_attention_backward", TORCH_BOX(&fastgru::attention_backward));
  m.impl("cpu_attention_plain_forward", TORCH_BOX(&fastgru::plain_attention));
  m.impl("cpu_attention_plain_backward", TORCH_BOX(&fastgru::plain_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastgru, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastgru::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&fastgru::cpu_isas));
  m.impl("cpu_set_isa", TORCH_BOX(&fastgru::cpu_set_isa));
  m.impl("cpu_backoffs", TORCH_BOX(&fastgru::cpu_backoffs));
  m.impl("cpu_release_memory", TORCH_BOX(&fastgru::cpu_release_memory));
  m.impl("cpu_set_poison", TORCH_BOX(&fastgru::cpu_set_poison));
  m.impl("cpu_set_chunk_tokens", TORCH_BOX(&fastgru::cpu_set_chunk_tokens));
}
