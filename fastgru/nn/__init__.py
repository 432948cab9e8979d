"""Exports the modules, which hold parameters and check arguments; the maths is in the operators."""

from fastgru.nn.attention import AttentionDecoder, MultiheadAttention
from fastgru.nn.convert import ConversionReport, conversion_report, convert, patch, revert
from fastgru.nn.gru import GRU, GRUCell
from fastgru.nn.seq2seq import Decoder, Encoder, ReferenceDecoder, ReferenceEncoder

__all__ = [
    "GRU",
    "AttentionDecoder",
    "ConversionReport",
    "Decoder",
    "Encoder",
    "GRUCell",
    "MultiheadAttention",
    "ReferenceDecoder",
    "ReferenceEncoder",
    "conversion_report",
    "convert",
    "patch",
    "revert",
]
