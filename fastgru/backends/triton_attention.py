"""Launches the attention kernels of ``fastgru.kernels``. Triton is imported at the first call."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgru.backends.reference_attention import Attention, dropout_threshold, empty_like_layout

# Said outright, because Triton's defaults change from one release to the next.
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fastgru.kernels.{name}")


def _rows(t: Tensor) -> Tensor:
    """With the columns of a row next to each other."""
    return t if t.size(3) == 1 or t.stride(3) == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


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
            *(a.scale, a.softcap, a.window_left, a.window_right),
            dropout_threshold(a.dropout_p),
            1 / (1 - a.dropout_p),
        )
        columns, value_columns = (max(16, 1 << (n - 1).bit_length()) for n in (D, Dv))
        # float32 tiles take twice the shared memory; so do wide heads.
        small = max(columns, value_columns) > 128 or a.query.dtype == torch.float32
        self.block_m = self.block_n = 32 if small else 64
        self.constants: dict[str, Any] = {
            "BOTTOM_RIGHT": a.bottom_right,
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
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": columns,
            "BLOCK_DV": value_columns,
        }
        self.query_programs = B * heads * -(-Lq // self.block_m)
        self.key_programs = B * a.key.size(1) * -(-Lk // self.block_n)

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs:
            kernel[(programs,)](*arguments, *self.scalars, **self.constants, **constants, **_OPTIONS)


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The forward operator; see :mod:`fastgru.ops.attention_schema`."""
    a = Attention(*arguments)
    launch = _Launch(a)
    output = empty_like_layout(a.query, a.value.size(3))
    lse = torch.empty(a.query.shape[:3], dtype=torch.float32, device=a.query.device)
    tensors = (launch.query, launch.key, launch.value, output)
    kernel = _module("attn_fwd").attention_forward
    launch(kernel, launch.query_programs, *tensors, lse, *launch.pointers, *_strides(*tensors))
    return output, lse


def attention_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward operator; see :mod:`fastgru.ops.attention_schema`. A bias gradient takes memory for every score."""
    *inputs, output, lse, need_bias_grad = arguments
    a = Attention(*inputs)
    launch = _Launch(a)
    d_output = torch.zeros_like(output) if grad_output is None else _rows(grad_output)
    delta = (d_output.float() * output.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    delta = delta.contiguous()
    d_query, d_key, d_value = (empty_like_layout(t, t.size(3)) for t in (a.query, a.key, a.value))
    wants_bias = need_bias_grad and a.bias is not None
    scores = (*a.query.shape[:3], a.key.size(2))
    # Zeros: tiles that nothing can see are not visited.
    d_scores = torch.zeros(scores if wants_bias else 0, dtype=torch.float32, device=a.query.device)
    tensors = (launch.query, launch.key, launch.value, d_output)
    kernels = _module("attn_bwd")
    launch(
        kernels.attention_backward_queries,
        launch.query_programs,
        *(*tensors, lse, delta, d_query, d_scores, *launch.pointers, *_strides(*tensors, d_query)),
        BIAS_GRAD=wants_bias,
    )
    launch(
        kernels.attention_backward_keys,
        launch.key_programs,
        *(*tensors, lse, delta, d_key, d_value, *launch.pointers, *_strides(*tensors, d_key, d_value)),
    )
    if wants_bias and a.bias is not None:
        d_scores = d_scores.sum_to_size(a.bias.shape)
    return d_query, d_key, d_value, d_scores.to(a.query.dtype)
