"""Registers the Gluon backend: attention on Hopper GPUs, by kernels that were compiled ahead of time."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from fastgru import _library
from fastgru.backends import registry, triton

#: Where they lie.
CUBINS = Path(_library.__file__).parent / "cubins"


@functools.cache
def manifest() -> dict[str, Any] | None:
    """How the kernels of this installation are launched, by name; None where there are none."""
    path = CUBINS / "manifest.json"
    return dict(json.loads(path.read_text())["kernels"]) if path.exists() else None


def _available() -> str | None:
    if (reason := triton._available()) is not None:
        return f"what it has no kernel for runs on the backend 'triton', of which: {reason}"
    if _library.load_error is not None:
        return _library.load_error
    if manifest() is None:
        return "this installation holds no kernels compiled for it; install a wheel for CUDA (+cu...)"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability != (9, 0) or torch.version.hip is not None:
        return f"it is for GPUs of compute capability 9.0 (Hopper), and this one has {capability[0]}.{capability[1]}"
    return None


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"it has no kernels for {dtype}"


def covers(dtype: torch.dtype) -> str:
    """The kernels there are for a dtype."""
    head = f"attention_forward_{str(dtype).removeprefix('torch.')}_"
    found = sorted(int(name.removeprefix(head)) for name in manifest() or {} if name.startswith(head))
    return f"forward and backward with D = {', '.join(map(str, found)) or 'none'}"


registry.register(
    registry.Backend(
        name="gluon",
        devices=("cuda",),
        priority=65,
        available=_available,
        supports=_supports,
    )
)
