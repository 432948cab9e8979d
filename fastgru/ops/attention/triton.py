"""Launches the attention kernels in Triton, which is imported at the first call.

The statistics that forward saves for backward, float32 [2, B, Hq, Lq], mean the same here and in
:mod:`fastgru.ops.attention.gluon`, since ``auto`` may take the forward pass of one and the backward pass of the other:

    m   the row's largest product q . k, where nothing but hiding is done to the scores and their scale is positive
        (:func:`in_products`); else its largest score s; 0 where it sees nothing
    l   the sum of e^(s - m), of e^(scale (q . k - m)) in the former case; 0 where the row sees nothing
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.ops.attention.arguments import Attention, empty_like_layout
from fastgru.ops.attention.reference import dropout_threshold, log_sum

# Said outright, because Triton's defaults change from one release to the next.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}

# BLOCK_M, BLOCK_N and stages of the forward kernel and of the kernels by queries and by keys of the backward pass, for
# up to 64, 128 and 256 columns, with which no case of the compile gate spills with Triton 3.6, 3.8 or 3.9. What takes
# more registers: float32, wide heads, all that shapes scores but lengths and windows (what is not light), and the two
# sums of the kernel by keys. Small tiles are not always safer: of the 255 registers of a thread ptxas may choose to use
# 80 or 128 only, and then spills a few; each release draws the line elsewhere.
_TILES = {
    "light": {
        64: ((64, 64, 2), (64, 32, 2), (64, 32, 1)),
        128: ((64, 64, 2), (64, 32, 2), (32, 64, 2)),
        256: ((32, 32, 2), (16, 32, 1), (16, 32, 2)),
    },
    "heavy": {
        64: ((32, 32, 2), (32, 32, 2), (32, 32, 2)),
        128: ((32, 32, 2), (32, 32, 2), (32, 32, 2)),
        256: ((32, 16, 2), (16, 32, 2), (16, 32, 1)),
    },
    "float32": {
        64: ((32, 16, 2), (16, 32, 2), (16, 16, 2)),
        128: ((32, 16, 2), (32, 16, 2), (16, 16, 1)),
        256: ((16, 16, 2), (16, 32, 2), (16, 16, 1)),
    },
}

# Few queries and many keys: their tiles are split until so many programs run, each with so many tiles of keys.
_PROGRAMS, _LEAST_TILES, _MOST_SPLITS = 256, 4, 32


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fastgru.kernels.{name}")


def _rows(t: Tensor) -> Tensor:
    """With the columns of a row next to each other."""
    return t if t.size(3) == 1 or t.stride(3) == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


class Tile(NamedTuple):
    """BLOCK_M queries and BLOCK_N keys of a kernel, and how many of its loop's tiles are under way at once."""

    queries: int
    keys: int
    stages: int


class Tiles(NamedTuple):
    """Of the three kernels."""

    forward: Tile
    by_queries: Tile
    by_keys: Tile


def tiles(columns: int, kind: str) -> Tiles:
    """Those for heads of so many columns, a power of 2; ``kind``: "light", "heavy" or "float32"."""
    return Tiles(*(Tile(*sizes) for sizes in _TILES[kind][min(max(columns, 64), 256)]))


def in_products(a: Attention) -> bool:
    """Whether the references of the exponents are products, not scores. (Scales near the ends of float32's range would
    lose digits, or overflow.)"""
    return a.softcap == 0 and a.alibi_slopes is None and a.bias is None and 1e-30 < a.scale < 1e30


def factor(a: Attention) -> float:
    """Of the exponents, which are powers of 2."""
    return (a.scale if in_products(a) else 1.0) * math.log2(math.e)


class _Launch:
    """The arguments that all kernels share, in their order."""

    def __init__(self, a: Attention) -> None:
        B, heads, Lq, D = a.query.shape
        Lk, Dv = a.value.shape[2:]
        full = (B, heads, Lq, Lk)
        self.query, self.key, self.value = (_rows(t) for t in (a.query, a.key, a.value))
        nothing = self.query
        bias, mask = (None if t is None else t.expand(full) for t in (a.bias, a.mask))
        self.pointers = (
            nothing if bias is None else bias,
            nothing if mask is None else mask.view(torch.int8),
            nothing if a.alibi_slopes is None else a.alibi_slopes.contiguous(),
            nothing if a.q_lengths is None else a.q_lengths.contiguous(),
            nothing if a.k_lengths is None else a.k_lengths.contiguous(),
            nothing if a.dropout_seed is None else a.dropout_seed,
        )
        self.scalars = (
            *((0,) * 4 if bias is None else bias.stride()),
            *((0,) * 4 if mask is None else mask.stride()),
            heads if a.alibi_slopes is not None and a.alibi_slopes.size(0) > 1 else 0,
            *(heads, a.group, Lq, Lk, D, Dv),
            *(a.scale, factor(a), a.softcap, a.window_left, a.window_right),
            dropout_threshold(a.dropout_p),
            1 / (1 - a.dropout_p),
        )
        columns, value_columns = (max(16, 1 << (n - 1).bit_length()) for n in (D, Dv))
        shapes = (a.bias, a.mask, a.alibi_slopes, a.dropout_seed)
        light = a.softcap == 0 and all(t is None for t in shapes)
        kind = "float32" if a.query.dtype == torch.float32 else "light" if light else "heavy"
        self.tiles = tiles(max(columns, value_columns), kind)
        self.constants: dict[str, Any] = {
            "BOTTOM_RIGHT": a.bottom_right,
            "IN_PRODUCTS": in_products(a),
            "SOFTCAP": a.softcap > 0,
            "BIAS": bias is not None,
            "MASK": mask is not None,
            "ALIBI": a.alibi_slopes is not None,
            "LEFT": a.window_left >= 0,
            "RIGHT": a.window_right >= 0,
            "DROPOUT": a.dropout_seed is not None,
            "HAS_Q": a.q_lengths is not None,
            "HAS_K": a.k_lengths is not None,
            "PRECISION": "ieee",
            "BLOCK_D": columns,
            "BLOCK_DV": value_columns,
        }

    def __call__(
        self, kernel: Any, tile: Tile, programs: int, *arguments: Any, splits: int = 1, **constants: Any
    ) -> None:
        if programs:
            constants |= {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "num_stages": tile.stages}
            kernel[(programs, splits)](*arguments, *self.scalars, **self.constants, **constants, **_OPTIONS)


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator; see :mod:`fastgru.ops.attention.schema`."""
    a = Attention(*arguments)
    launch = _Launch(a)
    output = empty_like_layout(a.query, a.value.size(3))
    rows = a.query.shape[:3]
    lse, statistics = (torch.empty(shape, dtype=torch.float32, device=a.query.device) for shape in (rows, (2, *rows)))
    kernel = _module("attention.forward").attention_forward
    tile = launch.tiles.forward
    programs = a.query.shape[0] * a.query.shape[1] * -(-a.query.shape[2] // tile.queries)
    splits = _splits(programs, -(-a.key.shape[2] // tile.keys))
    out, parts = output.unsqueeze(0), statistics.unsqueeze(0)
    if splits > 1:
        out, parts = (
            torch.empty((splits, *t.shape), dtype=torch.float32, device=t.device) for t in (output, statistics)
        )
    tensors = (launch.query, launch.key, launch.value, out[0])
    # From one split to the next.
    steps = (out.stride(0), parts.stride(0))
    launch(
        kernel,
        tile,
        programs,
        *(*tensors, lse, parts, *launch.pointers, *_strides(*tensors), *steps),
        splits=splits,
    )
    if splits > 1:
        _join(a, out, parts, output, lse, statistics)
    return output, lse, statistics


def _splits(programs: int, key_tiles: int) -> int:
    """Into how many parts the keys of a tile of queries are cut: enough programs to fill a GPU, and no part too small.
    A fixed number of programs stands for the GPU, so that results do not depend on it."""
    parts = min(_PROGRAMS // max(1, programs), key_tiles // _LEAST_TILES)
    return max(1, min(parts, _MOST_SPLITS))


def _join(a: Attention, out: Tensor, parts: Tensor, output: Tensor, lse: Tensor, statistics: Tensor) -> None:
    """Adds up the splits, weighted by their share of the sum of exponentials: a fixed order, so deterministic."""
    tops, totals = parts.unbind(1)
    tops = tops.masked_fill(totals == 0, -torch.inf)
    top = tops.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp2((tops - top) * factor(a)) * totals
    total = weights.sum(0)
    torch.stack((top, total), out=statistics)
    lse.copy_(log_sum(top * a.scale if in_products(a) else top, total))
    shares = weights / total.masked_fill(total == 0, 1)
    output.copy_((out * shares.unsqueeze(-1)).sum(0))


def attention_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward operator; see :mod:`fastgru.ops.attention.schema`. A bias gradient takes memory for every score."""
    *inputs, output, statistics, need_bias_grad = arguments
    a = Attention(*inputs)
    launch = _Launch(a)
    d_output = torch.zeros_like(output) if grad_output is None else _rows(grad_output)
    # 0 where one weight is all, but NaN stays NaN; see kernels/attention/backward.py.
    delta = (d_output.float() * output.float()).sum(-1) * (statistics[1] != 1)
    if grad_lse is not None:
        delta = delta - grad_lse
    delta = delta.contiguous()
    d_query, d_key, d_value = (empty_like_layout(t, t.size(3)) for t in (a.query, a.key, a.value))
    wants_bias = need_bias_grad and a.bias is not None
    scores = (*a.query.shape[:3], a.key.size(2))
    # Zeros: tiles that nothing can see are not visited.
    d_scores = torch.zeros(scores if wants_bias else 0, dtype=torch.float32, device=a.query.device)
    tensors = (launch.query, launch.key, launch.value, d_output)
    kernels = _module("attention.backward")
    launch(
        kernels.attention_backward_queries,
        launch.tiles.by_queries,
        a.query.shape[0] * a.query.shape[1] * -(-a.query.shape[2] // launch.tiles.by_queries.queries),
        *(*tensors, statistics, delta, d_query, d_scores, *launch.pointers, *_strides(*tensors, d_query)),
        BIAS_GRAD=wants_bias,
    )
    launch(
        kernels.attention_backward_keys,
        launch.tiles.by_keys,
        a.key.shape[0] * a.key.shape[1] * -(-a.key.shape[2] // launch.tiles.by_keys.keys),
        *(*tensors, statistics, delta, d_key, d_value, *launch.pointers, *_strides(*tensors, d_key, d_value)),
    )
    if wants_bias and a.bias is not None:
        d_scores = d_scores.sum_to_size(a.bias.shape)
    return d_query, d_key, d_value, d_scores.to(a.query.dtype)
