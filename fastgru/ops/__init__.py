"""Operators: schema, argument checks, fake kernels and autograd. Importing this package registers them."""

from fastgru.ops.attention import flash_attention, scaled_dot_product_attention
from fastgru.ops.gru import gru, gru_cell

__all__ = ["flash_attention", "gru", "gru_cell", "scaled_dot_product_attention"]
