"""Loads the compiled library, softly: the package works without it, and keeps the reason why it is absent."""

from __future__ import annotations

from pathlib import Path

import torch

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
