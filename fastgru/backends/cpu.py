"""Registers the CPU backend: C++ kernels in the compiled library, for every dtype they are compiled for.

``FASTGRU_CPU_ISA`` forces an instruction set; the library reads it, and its first call raises if it cannot be had.
"""

from __future__ import annotations

import torch

from fastgru import _library
from fastgru.backends import registry

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _available() -> str | None:
    return _library.load_error


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"it has no kernels for {dtype}"


registry.register(
    registry.Backend(name="cpu", devices=("cpu",), priority=100, available=_available, supports=_supports)
)
