"""Widens dtypes for computation, applies autocast to arguments, and keeps it out of operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fastgru import _torch_private

_HALF = (torch.bfloat16, torch.float16)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """An operator gets its dtypes chosen; autocast must not cast the products it is made of."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _torch_private.is_any_autocast_enabled():
            return function(*args, **kwargs)
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's operators take them: in the dtype of autocast, but for float64, which stays."""
    device = tensors[0].device.type
    if not _torch_private.is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors)
