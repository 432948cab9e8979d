"""Modules. They hold parameters and check arguments; the maths is in the operators."""

from fastgru.nn.attention import AttentionDecoder, MultiheadAttention
from fastgru.nn.gru import GRU, GRUCell
from fastgru.nn.seq2seq import Decoder, Encoder, ReferenceDecoder, ReferenceEncoder

__all__ = [
    "GRU",
    "AttentionDecoder",
    "Decoder",
    "Encoder",
    "GRUCell",
    "MultiheadAttention",
    "ReferenceDecoder",
    "ReferenceEncoder",
]
