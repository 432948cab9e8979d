"""Drop-in GRU modules for PyTorch on faster kernels."""

from __future__ import annotations

from fastgru.backends.registry import BackendUnavailable, explain, use_backend
from fastgru.nn import (
    GRU,
    ConversionReport,
    Decoder,
    Encoder,
    GRUCell,
    ReferenceDecoder,
    ReferenceEncoder,
    conversion_report,
    convert,
    patch,
    revert,
)
from fastgru.ops import gru

__all__ = [
    "GRU",
    "BackendUnavailable",
    "ConversionReport",
    "Decoder",
    "Encoder",
    "GRUCell",
    "ReferenceDecoder",
    "ReferenceEncoder",
    "conversion_report",
    "convert",
    "explain",
    "gru",
    "patch",
    "revert",
    "use_backend",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        # Read on demand: importlib.metadata costs more time than the rest of this package.
        from importlib.metadata import version

        return version("fastgru")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
