"""What other implementations of attention offer: all columns but fastgru's of docs/attention-features.md.

Read in their sources and documentation in November 2026, not run here. Rows are named as the tests marked
``feature("Attention", row, detail)`` name them.
"""

from __future__ import annotations

PEERS = [
    "FA2 2.8",
    "FA3",
    "FA4 sm90",
    "SDPA cuDNN",
    "SDPA flash",
    "SDPA mem-eff",
    "Flex (Triton)",
    "Triton tutorial 06",
    "TLX sm90",
    "flashinfer",
    "xformers",
    "ThunderKittens h100",
    "SageAttention 2",
    "fla attn",
    "SDPA CPU flash",
]

_CELLS = """
backward | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✗ | ✓ | ✓ | ✗ | ✓ | ✓
dtypes | f16 bf16 | f16 bf16, fp8 fwd | f16 bf16 | f16 bf16 (fp8 native) | f16 bf16 | f16 bf16 f32 | f16 bf16 f32 \
| f16, fp8 fwd | f16 bf16 | f16 bf16 fp8 fp4 | f16 bf16 f32 | bf16 | int8/fp8 | f16 bf16 | f32 f64 bf16 f16
head dim | ≤256 | 64 to 256 (Dv to 512) | 8 to 256 | ≤128/256 | ≤256 | free | any, padded to a power of 2 | 16 to 256 \
| 64, 128 | 64 to 256 (512) | free | 64, 128 | ≤128 | free | free
D ≠ Dv | ✗ | ~ | ✓ | ✓ | ✗ | ✓ | ✓ | ✗ | ✗ | ✓ | ✓ | ✗ | ✗ | ✓ | ✗
causal, Lq ≠ Lk | bottom-right | bottom-right | bottom-right | top-left (both native) | refuses | top-left | user \
| equal only | equal only | bottom-right | both | equal only | top-left ~ | equal only | top-left
GQA/MQA | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✗ | ✗ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓
varlen/nested | cu_seqlens | cu_seqlens, seqused | cu_seqlens, seqused | ~ by environment variable \
| nested, varlen_attn | nested, no gradient | document mask | ✗ | ✗ | ragged, paged | block-diagonal | ✗ | ~ \
| cu_seqlens | ✗
sliding window | ✓ | ✓ | ✓ | native | varlen only | ✗ | ✓ | ✗ | ✗ | left | ✓ | ✗ | ✗ | ✓ | by mask
softcap | ✓ | ✓ | ✓ | score_mod | ✗ | ✗ | ✓ | ✗ | ✗ | ✓ | ✗ | ✗ | ✗ | ✗ | ✗
ALiBi | ✓ | ✗ | score_mod | native | ✗ | by bias | ✓ | ✗ | ✗ | ✓ | by bias | ✗ | ✗ | ✗ | by mask
additive bias / mask | ✗ | ✗ | score_mod, mask_mod | ✓ (bias gradient native) | ✗ | ✓, gradient | ✓, gradient | ✗ | ✗ \
| bool | ✓, gradient | ✗ | ✗ | ✗ | ✓, no gradient
key padding | unpad | seqused_k | seqused_k | native lengths | ✗ | mask | mask | ✗ | ✗ | ✓ | ✓ | ✗ | varlen \
| cu_seqlens | mask
dropout | ✓ | ✗ | ✗ | in steps of 1/16 | ✓ | ✓ | ✗ | ✗ | ✗ | ✗ | ✓ | ✗ | ✗ | ✗ | ✗
LSE | ✓ | ✓ | ✓ | aten | aten | aten | ✓ | internal | internal | ✓ | ✓ | ✓ | ✓ | internal | aten
paged KV / decode | ✓ | ✓ | paged, no split | native | block_table | ✗ | decode kernel | ✗ | ✗ \
| ✓ | ✓ | ✗ | ✗ | decode | ✗
fully masked row gives 0 | ✓ | ✓ | ✓ | bugs | n/a | fixed late | ✓ | ✗ | ✗ | ✓ | ✓ | n/a | n/a | n/a | ✓
deterministic backward | flag | flag | flag | ✗ in torch | ~ | ✗ | ✓ | ✓ | ✗ | - | ~ | ✗ | - | ✓ | ✓
double backward | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ (math ✓)
torch.compile | custom_op | custom_op | by torch | ✓ | ✓ | ✓ | is compile | ✗ | ✗ | ✓ | ✓ | ✗ | ~ | ~ | ✓
CPU | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | forward only | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✗ | ✓
"""

#: Row of the table -> the peers' cells.
CELLS: dict[str, list[str]] = {}
for _line in _CELLS.strip().splitlines():
    _name, *_cells = _line.split(" | ")
    assert len(_cells) == len(PEERS), _name
    CELLS[_name] = _cells

SOURCES = """\
✓ yes, ✗ no, ~ partly, n/a does not apply. Where the peers' columns come from:

- FA2, FA3, FA4: Dao-AILab/flash-attention 2.8.4, `flash_attn/flash_attn_interface.py`, `hopper/`, `flash_attn/cute/`.
- SDPA: torch 2.13, `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` and `native/cpu/FlashAttentionKernel.cpp`;
  native features of cuDNN: `graph_properties.h` of cudnn-frontend.
- Flex: `torch/nn/attention/flex_attention.py` and its Triton templates.
- Triton tutorial 06: `python/tutorials/06-fused-attention.py`. TLX: `third_party/tlx/ops/kernels/flash_attn/sm90.py` of
  facebookexperimental/triton.
- flashinfer, xformers, ThunderKittens, SageAttention: their READMEs and interfaces. fla: `fla/ops/attn/parallel.py`.

Cells of ThunderKittens, SageAttention, flashinfer and Flex about determinism, and those with ~, were taken from READMEs
or from the shape of the code, not verified exhaustively.
"""
