"""Defines the operators by families, and exports the functions that check arguments and call them."""

from fastgru.ops.additive.api import additive_attention
from fastgru.ops.attention.api import attention_weights, flash_attention, scaled_dot_product_attention
from fastgru.ops.decompositions import decompositions
from fastgru.ops.flops import register_when_wanted
from fastgru.ops.gru.api import gru, gru_cell

register_when_wanted()

__all__ = [
    "additive_attention",
    "attention_weights",
    "decompositions",
    "flash_attention",
    "gru",
    "gru_cell",
    "scaled_dot_product_attention",
]
