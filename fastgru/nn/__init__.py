"""Modules. They hold parameters and check arguments; the maths is in the operators."""

from fastgru.nn.convert import ConversionReport, conversion_report, convert, patch, revert
from fastgru.nn.gru import GRU, GRUCell
from fastgru.nn.seq2seq import Decoder, Encoder, ReferenceDecoder, ReferenceEncoder

__all__ = [
    "GRU",
    "ConversionReport",
    "Decoder",
    "Encoder",
    "GRUCell",
    "ReferenceDecoder",
    "ReferenceEncoder",
    "conversion_report",
    "convert",
    "patch",
    "revert",
]
