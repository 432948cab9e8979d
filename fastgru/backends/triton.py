"""Registers the Triton backend: GPUs, and the CPU in Triton's interpreter.

Triton is imported when a kernel is first launched. ``TRITON_INTERPRET=1``, Triton's own variable, also admits CPU
tensors: the kernels then run in its interpreter, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from fastgru.backends import registry

#: What its GRU computes in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


#: The oldest Triton whose language the kernels are written in.
OLDEST = (3, 6)

#: True where the kernels run on the CPU, in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _missing() -> str | None:
    """None when a Triton new enough is installed, else what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    installed: str = importlib.import_module("triton").__version__
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton {installed} is installed and {oldest} is the oldest it works with; pip install --upgrade triton"
    return None


@functools.cache
def _available() -> str | None:
    if (missing := _missing()) is not None:
        return missing
    if INTERPRETED:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only; install a build for your GPU, see https://pytorch.org"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; check the driver, and CUDA_VISIBLE_DEVICES"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU is of compute capability {major}.{minor} and 8.0 is the oldest it works with"
    return None


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"it has no kernels for {dtype}"


registry.register(
    registry.Backend(
        name="triton",
        devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
        priority=60,
        available=_available,
        supports=_supports,
    )
)
