"""Registers the backends, each with the devices and dtypes it can run on, and chooses between them."""

from fastgru.backends import cpu, cuda, cudnn, gluon, reference, triton
from fastgru.backends.registry import BackendUnavailable, explain, select, use_backend

__all__ = [
    "BackendUnavailable", "cpu", "cuda", "cudnn", "explain", "gluon", "reference", "select", "triton", "use_backend",
]  # fmt: skip
