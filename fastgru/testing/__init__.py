"""The numeric rule and the problems, for tests, benchmarks and users who want to check their own machine."""

from fastgru.testing.attention import AttentionProblem, assert_attention_parity, attention_parity
from fastgru.testing.gru import GruProblem, assert_parity, parity
from fastgru.testing.rule import FLOOR, MULTIPLE, Comparison, compare, error_limit, failures
from fastgru.testing.selection import pairwise

__all__ = [
    "FLOOR",
    "MULTIPLE",
    "AttentionProblem",
    "Comparison",
    "GruProblem",
    "assert_attention_parity",
    "assert_parity",
    "attention_parity",
    "compare",
    "error_limit",
    "failures",
    "pairwise",
    "parity",
]
