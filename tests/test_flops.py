"""FlopCounterMode counts for our operators what it counts for torch's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fastgru
from fastgru.ops.flops import formulas


def counts(forward: Callable[[], Tensor], backward: bool = True) -> tuple[int, int]:
    """Of the forward pass and of the backward pass."""
    with FlopCounterMode(display=False) as first:
        output = forward()
    with FlopCounterMode(display=False) as second:
        if backward:
            output.sum().backward()
    return first.get_total_flops(), second.get_total_flops()


def both(call: Callable[[Any], Tensor], module: nn.Module, **how: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The counts of a module of torch and of its conversion."""
    want = counts(lambda: call(module), **how)
    assert want[0] > 0
    return counts(lambda: call(fastgru.convert(module)), **how), want


@pytest.mark.parametrize("trains", [True, False], ids=["training", "no gradient"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True, "num_layers": 3}],
    ids=str,
)
def test_gru(backend: str, options: dict[str, Any], trains: bool) -> None:
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = 4 if options.get("batch_first") else 3
    x, hx = torch.randn(4, 3, 5, requires_grad=trains), torch.randn(states, batch, 7, requires_grad=trains)
    gru = nn.GRU(5, 7, **options).requires_grad_(trains)
    got, want = both(lambda module: module(x, hx)[0], gru, backward=trains)
    assert got == want
    assert (want[1] > 0) is trains


@pytest.mark.parametrize("wanted", [("input",), ("hx",), ("weights", "hx"), ("input", "hx")], ids=str)
def test_only_the_gradients_that_are_wanted(backend: str, wanted: tuple[str, ...]) -> None:
    x, hx = torch.randn(4, 3, 5, requires_grad="input" in wanted), torch.randn(1, 3, 7, requires_grad="hx" in wanted)
    got, want = both(lambda module: module(x, hx)[0], nn.GRU(5, 7).requires_grad_("weights" in wanted))
    # nn.GRU leaves out the first step's gradient of an initial state that needs none.
    left_out = 0 if "hx" in wanted else 2 * 3 * (3 * 7) * 7
    assert got == (want[0], want[1] + left_out)


def test_packed_sequences_and_cells(backend: str) -> None:
    packed = pack_sequence([torch.randn(n, 5) for n in (4, 2, 1)])
    packed.data.requires_grad_()
    hx = torch.randn(1, 3, 7, requires_grad=True)
    got, want = both(lambda module: module(packed, hx)[0].data, nn.GRU(5, 7))
    assert got == want
    x, state = torch.randn(3, 5, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    got, want = both(lambda module: module(x, state), nn.GRUCell(5, 7))
    assert got == want


def test_gates_that_are_made_again_count_again(backend: str) -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    kept, again = fastgru.GRU(5, 7), fastgru.GRU(5, 7, save_gates=False)
    forward, backward = counts(lambda: kept(x)[0])
    assert counts(lambda: again(x)[0]) == (forward, backward + forward)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0, "window": (2, 2)}], ids=str)
@pytest.mark.parametrize("heads", [4, 2], ids=["heads", "shared heads"])
def test_attention(backend: str, heads: int, options: dict[str, Any]) -> None:
    q, k, v = (torch.randn(2, *shape, requires_grad=True) for shape in ((4, 5, 8), (heads, 7, 8), (heads, 7, 6)))
    got = counts(lambda: fastgru.flash_attention(q, k, v, enable_gqa=True, **options))
    # As without sharing, of which the formulas of older versions of torch do not know.
    shapes = q.shape, (2, 4, 7, 8), (2, 4, 7, 6)
    assert got == (sdpa_flop_count(*shapes), sdpa_backward_flop_count((2, 4, 5, 6), *shapes))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        decomposed = counts(
            lambda: nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), backward=False
        )
    assert got[0] == decomposed[0]


def test_multihead_attention(backend: str) -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    with sdpa_kernel(SDPBackend.MATH):
        got, want = both(lambda module: module(x, x, x, need_weights=False)[0], module)
    assert got == (want[0], want[1] + 2 * 3 * 2 * 5 * 5 * 4)  # the scores again


def test_additive_attention() -> None:
    q, k, v, w = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (2, 5, 8), (2, 5, 6), (8,)))

    def composite() -> Tensor:
        return ((q[:, :, None] + k[:, None]).tanh() @ w[:, None]).squeeze(-1).softmax(-1) @ v

    forward, backward = counts(composite)
    got = counts(lambda: fastgru.additive_attention(q, k, v, w))
    assert got == (forward, backward + 2 * 2 * 3 * 5 * 8)  # the scores again


def test_every_operator_that_computes_has_a_formula() -> None:
    # Those of the GRU's loops on a GPU run inside of one of these.
    passes = r"(gru_(infer|train|backward)|(attention|attention_plain|additive)_(forward|backward))"
    computing = {name for name in dir(torch.ops.fastgru) if re.fullmatch(f"[a-z]+_{passes}", name)}
    assert {op.overloadpacket for op in formulas()} == {getattr(torch.ops.fastgru, name) for name in computing}
    assert all(op.overloadpacket in flop_registry for op in formulas())


@pytest.mark.parametrize("first", ["fastgru", "torch.utils.flop_counter"])
def test_the_counter_is_not_imported_but_waited_for(first: str) -> None:
    code = f"""
import sys, torch
import {first}
assert ("torch.utils.flop_counter" in sys.modules) is ({first!r} != "fastgru")
import fastgru
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastgru.GRU(5, 7)(torch.randn(4, 3, 5))
assert counter.get_total_flops() == 2 * 4 * 3 * 3 * 7 * (5 + 7), counter.get_total_flops()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
