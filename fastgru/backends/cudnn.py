"""Registers the cuDNN backend: the kernels of nn.GRU on a GPU (cuDNN's, MIOpen's on AMD, or ATen's)."""

from __future__ import annotations

import torch

from fastgru._torch_private import recorded_within_operators
from fastgru.backends import registry


def _available() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; check the driver, and that this torch is built for your GPU"
    if recorded_within_operators is None:
        return "this torch has no torch._C._SetExcludeDispatchKeyGuard; use nn.GRU itself"
    if not torch.backends.cudnn.is_available():
        return "this torch is built without cuDNN; install a build from https://pytorch.org"
    return None if torch.backends.cudnn.enabled else "torch.backends.cudnn.enabled is False; set it to True"


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"it computes in floating point, not in {dtype}"


registry.register(
    registry.Backend(name="cudnn", devices=("cuda",), priority=50, available=_available, supports=_supports)
)
