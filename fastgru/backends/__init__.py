"""Implementations of the operators and the choice between them. Importing this package registers every backend."""

from fastgru.backends import cpu, cudnn, gluon, reference, triton
from fastgru.backends.registry import BackendUnavailable, explain, select, use_backend

__all__ = ["BackendUnavailable", "cpu", "cudnn", "explain", "gluon", "reference", "select", "triton", "use_backend"]
