"""Attention on the CPU beside torch's: ``pytest benchmarks``. Correctness is checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastgru

#: (B, H, Lq, Lk, D): long and short self-attention, and a decoding step.
SHAPES = [(1, 8, 1024, 1024, 64), (8, 8, 128, 128, 64), (32, 8, 1, 512, 64)]
PEERS: dict[str, Callable[..., Tensor]] = {
    "fastgru": fastgru.scaled_dot_product_attention,
    "torch": F.scaled_dot_product_attention,
}
ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    B, H, Lq, Lk, D = shape
    sizes = [(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D)]
    return tuple(torch.randn(size, dtype=dtype, requires_grad=requires_grad) for size in sizes)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(
    benchmark: BenchmarkFixture, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, peer: str
) -> None:
    benchmark.group = f"attention {shape} {str(dtype).removeprefix('torch.')}{', backward' if backward else ''}"
    inputs = _inputs(shape, dtype, backward)
    attention = PEERS[peer]
    exact = F.scaled_dot_product_attention(*(t.detach().double() for t in inputs))
    assert (attention(*inputs).double() - exact).abs().max() < ERROR[dtype]
    grad = torch.ones_like(exact, dtype=dtype)

    def training() -> Any:
        return torch.autograd.grad(attention(*inputs), inputs, grad)

    def forward() -> Any:
        with torch.inference_mode():
            return attention(*inputs)

    benchmark(training if backward else forward)
