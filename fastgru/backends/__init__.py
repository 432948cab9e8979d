"""Implementations of the operators and the choice between them. Importing this package registers every backend."""

from fastgru.backends import cpu, cuda, cudnn, gluon, reference, triton
from fastgru.backends.registry import BackendUnavailable, explain, select, use_backend

__all__ = [
    "BackendUnavailable", "cpu", "cuda", "cudnn", "explain", "gluon", "reference", "select", "triton", "use_backend",
]  # fmt: skip
