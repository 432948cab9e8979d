"""Registers the CUDA backend: NVIDIA GPUs from compute capability 8.0, where the library was built with CUDA."""

from __future__ import annotations

import functools

import torch

from fastgru import _library
from fastgru.backends import registry

#: What it computes in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _available() -> str | None:
    if _library.load_error is not None:
        return _library.load_error
    try:
        built_with, driver = torch.ops.fastgru.cuda_versions()
    except NotImplementedError:
        return (
            "this fastgru is built without its CUDA part; install its wheel for your CUDA, or build it with "
            "FASTGRU_CUDA=1 where there is an nvcc"
        )
    if torch.version.cuda is None:
        return "this torch is not built for CUDA; install a build for your GPU, see https://pytorch.org"
    # Within a major version an older driver runs what a newer toolkit compiled.
    if 0 < driver // 1000 < built_with // 1000:
        return (
            f"the driver runs CUDA {_version(driver)} and this build needs {built_with // 1000}.0; update the driver, "
            "or install the wheel of fastgru for an older CUDA"
        )
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; check the driver, and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"the GPU is of compute capability {major}.{minor} and 8.0 is the oldest it works with"
    try:
        torch.ops.fastgru.cuda_code_architecture(torch.cuda.current_device())
    except RuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("fastgru: ")
        return f"{reason}; build fastgru with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number // 10 % 100}"


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"it has no kernels for {dtype}"


registry.register(
    registry.Backend(name="cuda", devices=("cuda",), priority=70, available=_available, supports=_supports)
)
