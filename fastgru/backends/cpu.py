"""The C++ CPU backend. Its operators are implemented in the compiled library; here are only its terms of use."""

from __future__ import annotations

import functools
import os

import torch

from fastgru import _lib
from fastgru.backends import registry

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def _available() -> str | None:
    if _lib.load_error is not None:
        return _lib.load_error
    forced = os.environ.get("FASTGRU_CPU_ISA")
    if forced:
        usable = torch.ops.fastgru.cpu_isas().split(",")
        if forced not in usable:
            raise ValueError(f"FASTGRU_CPU_ISA: {forced!r} does not run on this machine; usable: {', '.join(usable)}")
        torch.ops.fastgru.cpu_set_isa(forced)
    return None


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"it has no kernels for {dtype}"


registry.register(
    registry.Backend(name="cpu", devices=("cpu",), priority=100, available=_available, supports=_supports)
)
