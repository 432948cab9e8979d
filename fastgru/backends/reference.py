"""Registers the reference backend, plain torch: every device, every floating or complex dtype."""

from __future__ import annotations

import torch

from fastgru.backends import registry


def _supports(device: str, dtype: torch.dtype) -> str | None:
    computes = dtype.is_floating_point or dtype.is_complex
    return None if computes else f"it computes in floating point, not in {dtype}"


registry.register(
    registry.Backend(name="reference", devices=("*",), priority=0, available=lambda: None, supports=_supports)
)
