"""Loads the compiled library, or keeps the reason why it is absent: the package works without it."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgru import _torch_private

LIBRARY_PATH = Path(__file__).with_name("_C.so")

_REMEDY = "rebuild it with a C++17 compiler: pip install --no-build-isolation -e . (in the source tree)"


def _load() -> str | None:
    if not LIBRARY_PATH.exists():
        return f"the compiled library {LIBRARY_PATH} is missing; {_REMEDY}"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"the compiled library {LIBRARY_PATH} does not load ({error}); {_REMEDY}"
    return None


#: None when the compiled library is loaded, else why it is not and what to do about it.
load_error: str | None = _load()


def _load_direct() -> tuple[Any, str | None]:
    """fastgru._direct, ready to use, or why it is absent."""
    if load_error is not None:
        return None, load_error
    try:
        module = importlib.import_module("fastgru._direct")
    except ImportError as error:
        return None, f"the compiled module fastgru._direct does not load ({error}); {_REMEDY}"
    if _torch_private.dlpack_exchange is None:
        return None, "this torch has no table of DLPack's functions"
    modes = _torch_private.modes()
    if isinstance(modes, str):
        return None, modes
    entry = ctypes.CDLL(str(LIBRARY_PATH)).fastgru_direct_calls
    entry.restype = ctypes.c_void_p
    functions = torch.empty_like, torch.is_grad_enabled, modes
    reason = module.setup(_torch_private.dlpack_exchange, entry(), torch.Tensor, nn.Parameter, *functions)
    return (None, reason) if reason is not None else (module, None)


#: The module for calls that go without torch's dispatcher, and why it is absent. See :mod:`fastgru.fast_path`.
direct, direct_error = _load_direct()
