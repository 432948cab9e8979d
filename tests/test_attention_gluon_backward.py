"""The backward kernels of attention for Hopper, as far as they can be tried without one: as test_attention_gluon.py."""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import gluon_emulator as emulator
import pytest
import torch
import torch.nn.functional as F
from test_attention_gluon import BUILD, VARIANTS, exact, pinned, problem, scalars
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru
from fastgru.backends import gluon, reference_attention, registry, triton_attention
from fastgru.backends.reference_attention import Attention
from fastgru.ops.attention_schema import ATTENTION_OPS

SOURCES = ("attn_sm90_common", "attn_sm90_bwd")


@pytest.fixture(scope="module")
def kernels() -> Any:
    return emulator.emulated(*SOURCES)


def start(variant: Any, kernel: Any, arguments: Any, programs: int, **how: Any) -> None:
    tensors, numbers = arguments
    given = []
    for name in inspect.signature(kernel).parameters:
        if name in variant.maps:
            given.append(emulator.Descriptor(tensors[name], variant.maps[name]))
        elif name in tensors:
            given.append(emulator.Pointer(torch.zeros(1) if tensors[name] is None else tensors[name]))
        elif name in numbers:
            given.append(numbers[name])
        else:
            assert name in variant.constants
    emulator.launch(kernel, programs, *given, **how, **variant.constants)


def gradients(
    a: Attention, kernels: Any, d_output: Tensor | None, d_lse: Tensor | None, programs: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, by the kernels' source, launched as the backend launches it."""
    output, lse = exact(a)
    variant = VARIANTS[gluon._name(a, "backward")]
    block = variant.constants["BLOCK_M"]
    call = gluon.Backward(a, output.to(a.query.dtype), lse.float(), d_output, d_lse, block, programs)
    for t in (*call.gradients, call.rows[0]["stats"], call.rows[0]["plan"]):
        t.fill_(math.nan if t.is_floating_point() else -7)
    rows = VARIANTS[gluon._name(a, "backward_rows")]
    start(rows, kernels.attention_backward_rows, call.rows, call.row_programs)
    start(variant, kernels.attention_backward, call.main, call.programs, seed=seed, together=True)
    return call.finish(a)


def seen(a: Attention) -> Tensor:
    """Which query sees which key, [B, 1, Lq, Lk]."""
    (B, _, Lq, _), Lk = a.query.shape, a.key.shape[2]
    q_lengths = torch.full((B,), Lq) if a.q_lengths is None else a.q_lengths
    k_lengths = torch.full((B,), Lk) if a.k_lengths is None else a.k_lengths
    diagonal = (k_lengths - q_lengths if a.bottom_right else torch.zeros(B)).view(-1, 1, 1)
    i, j = torch.arange(Lq)[:, None], torch.arange(Lk)
    visible = (i < q_lengths.view(-1, 1, 1)) & (j < k_lengths.view(-1, 1, 1))
    if a.window_right >= 0:
        visible &= j <= i + diagonal + a.window_right
    return visible[:, None]


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, whole blocks": {"Lq": 256, "Lk": 256},
    "one of each": {"B": 1, "Hq": 1, "Hk": 1, "Lq": 1, "Lk": 1},
    "one query": {"Lq": 1, "Lk": 700, "B": 1, "D": 128},
    "causal": {"right": 0, "Lq": 300, "Lk": 300},
    "causal, more keys": {"right": 0, "Lq": 130, "Lk": 400, "D": 128},
    "causal, more queries": {"right": 0, "Lq": 300, "Lk": 70},
    "causal, top left": {"right": 0, "bottom_right": False, "Lq": 70, "Lk": 300},
    "to the right": {"right": 100, "Lq": 200, "Lk": 400},
    "lengths": {"q_lengths": [200, 0], "k_lengths": [0, 131]},
    "lengths, causal": {"q_lengths": [37, 201], "k_lengths": [259, 130], "right": 0, "D": 128},
    "128 columns": {"D": 128, "Lq": 260, "Lk": 520, "B": 1},
    "float16": {"dtype": torch.float16, "D": 128, "k_lengths": [300, 17]},
    "groups, heads last": {"heads_last": True, "right": 0, "Hq": 6, "Hk": 2, "B": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name: str, kernels: Any) -> None:
    torch.manual_seed(list(CASES).index(name))
    a = problem(CASES[name])
    d_output = torch.randn(a.query.shape).to(a.query.dtype)
    d_lse = torch.randn(a.query.shape[:3])
    output, lse = exact(a)
    double = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in a]
    want = reference_attention.attention_backward(d_output.double(), d_lse.double(), *double, output, lse, False)
    found = gradients(a, kernels, d_output, d_lse)
    # The rule of fastgru.testing: at most three times the error of torch's own operator in the same dtype.
    def usual(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in (a.query, a.key, a.value)]
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(*inputs, attn_mask=seen(a), scale=a.scale, enable_gqa=True)
        return torch.autograd.grad(out, inputs, d_output.to(dtype))

    for ours, exactly, one, other in zip(found, want, usual(a.query.dtype), usual(torch.float64), strict=False):
        floor = 4 * torch.finfo(a.query.dtype).eps * exactly.abs().max()
        assert not ours.isnan().any()
        assert (ours - exactly).abs().max() <= 3 * (one - other).abs().max() + floor
    nothing = ~seen(a).any(3, keepdim=True)
    assert not (found[0] * nothing).any() and not (found[2] * ~seen(a).any(2).unsqueeze(3)).any()
