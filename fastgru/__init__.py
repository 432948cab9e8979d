"""Drop-in GRU and attention modules for PyTorch on faster kernels."""

from __future__ import annotations

import sys

import torch

# Torch's operators are the process's and can be defined once. So, if this is not the first import, because someone has
# taken this package out of sys.modules, the modules of the first one are put back.
_modules = vars(torch.ops.fastgru).setdefault("_modules", {})
for _name, _module in _modules.items():
    sys.modules.setdefault(_name, _module)
    if _name.count(".") == 1:
        globals()[_name.rpartition(".")[2]] = _module

from fastgru import flash_attn
from fastgru.backends.registry import BackendUnavailable, explain, use_backend
from fastgru.nn import (
    GRU,
    AttentionDecoder,
    ConversionReport,
    Decoder,
    Encoder,
    GRUCell,
    MultiheadAttention,
    ReferenceDecoder,
    ReferenceEncoder,
    conversion_report,
    convert,
    patch,
    revert,
)
from fastgru.ops import additive_attention, decompositions, flash_attention, gru, scaled_dot_product_attention

__all__ = [
    "GRU",
    "AttentionDecoder",
    "BackendUnavailable",
    "ConversionReport",
    "Decoder",
    "Encoder",
    "GRUCell",
    "MultiheadAttention",
    "ReferenceDecoder",
    "ReferenceEncoder",
    "additive_attention",
    "conversion_report",
    "convert",
    "decompositions",
    "explain",
    "flash_attention",
    "flash_attn",
    "gru",
    "patch",
    "revert",
    "scaled_dot_product_attention",
    "use_backend",
]

_modules |= {name: module for name, module in sys.modules.items() if name.startswith("fastgru.")}


def __getattr__(name: str) -> str:
    if name == "__version__":
        # Read on demand: importlib.metadata costs more time than the rest of this package.
        from importlib.metadata import version

        return version("fastgru")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
