"""Operators: schema, argument checks, fake kernels and autograd. Importing this package registers them."""

from fastgru.ops.gru import gru, gru_cell

__all__ = ["gru", "gru_cell"]
