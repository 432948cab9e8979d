"""Decides which calls may go without torch's dispatcher, which takes longer than a step of a small GRU.

The functions of ``fastgru._direct`` take dense tensors of one dtype on the CPU, of the right sizes, in eager mode with
no mode of torch active. They answer None to everything else, errors included, and the general path takes the call. Only
``fastgru/ops/<family>/eager.py`` calls them.
"""

from __future__ import annotations

from typing import Any

import torch

from fastgru import _library
from fastgru._torch_private import forward_mode
from fastgru.backends import registry

#: The compiled module, or None where it is missing (``_library.direct_error`` says why): then every call is an
#: operator's.
functions: Any = _library.direct


def lookup(family: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The compiled functions, if the backend ``cpu`` was chosen for a family at the last call, else None: the general
    path has it chosen."""
    if functions is None or forward_mode._current_level >= 0:
        return None
    backend = registry.selected(family, device, dtype)
    return functions if backend is not None and backend.name == "cpu" else None
