"""The kernels over the whole grid, their own source run on the CPU (see test_cuda_emulation.py). What a block sets in
global memory is seen by the others late, in any order its fences allow; who looks may see what is out of date."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import test_cuda_emulation
import torch
from emulation.build import load
from test_cuda_emulation import DTYPES, raw

from fastgru.ops.gru.reference import gate_stride


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the emulation with")
    return load("gru_grid")


@dataclass(frozen=True)
class Problem(test_cuda_emulation.Problem):
    H: int = 40
    T: int = 7  # more steps than there are places for the exchange
    each_direction: bool = False  # a launch for each

    def __str__(self) -> str:
        return super().__str__().replace("-c4x", "-x") + "-apart" * self.each_direction


class Layer(test_cuda_emulation.Layer):
    problem: Problem

    def how(self, fault: str) -> dict[str, Any]:
        given = super().how(fault)
        del given["cluster"]
        return given | {"each_direction": self.problem.each_direction}


PROBLEMS = [
    Problem("bf16"),
    Problem("f16", seed=1),
    Problem("tf32", seed=2),
    Problem("bf16", H=33, B=11, D=2, lengths=(7, 7, 6, 5, 5, 3, 2, 2, 1, 1, 1), seed=3),
    Problem("f16", H=17, B=2, D=2, bias=False, each_direction=True, seed=4),
    Problem("tf32", H=31, B=17, column_tiles=2, grad_h_n=False, seed=5),
    Problem("bf16", H=48, B=19, D=2, T=6, column_tiles=2, lengths=(6,) * 10 + (5, 4, 4, 3, 2, 2, 1, 1, 1), seed=6),
    Problem("bf16", H=1, B=1, T=1, seed=7),
    # More warps than blocks of h, and fewer; more weights than registers hold.
    Problem("f16", H=150, T=2, B=2, seed=8),
    Problem("tf32", H=520, T=1, B=1, column_tiles=2, seed=9),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_parity(emulation: ModuleType, problem: Problem) -> None:
    Layer(problem).assert_parity(emulation)


def test_same_bits_whatever_the_order(emulation: ModuleType) -> None:
    results = []
    for seed in range(5):
        layer = Layer(Problem("f16", H=17, T=6))
        layer.schedule = seed
        results.append(layer.ours(emulation))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results), name


FAULTS = [
    "missing wait",
    "lost word",
    "never cleared",
    "no fence after setting",
    "no fence before looking",
    "no block barrier",
    "stale workspace",
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_faults_do_not_go_unnoticed(emulation: ModuleType, direction: str, fault: str) -> None:
    """Wrong numbers, or an error of the emulation; some faults need a certain order of events to bring one about."""
    layer = Layer(Problem(H=17, T=9, B=2))
    output, h_n, gates = layer.forward(emulation)
    wanted = (output, h_n) if direction == "forward" else layer.backward(emulation, output, gates)

    def noticed(seed: int) -> bool:
        layer.schedule = seed
        try:
            if direction == "forward":
                got: tuple[torch.Tensor, ...] = layer.forward(emulation, fault)[:2]
            else:
                got = layer.backward(emulation, output, gates, fault)
        except RuntimeError:
            return True
        return not all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))

    assert any(noticed(seed) for seed in range(12))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_shared_memory(emulation: ModuleType, direction: str) -> None:
    """Of a multiprocessor of compute capability 9.0, and of 8.0 with as many hidden units as an A100 has room for; 0
    where a layer is too large for any."""
    for precision, largest in (("bf16", 2048), ("f16", 2048), ("tf32", 1024)):
        for columns in (1, 2):
            assert 0 < emulation.shared_bytes(direction, precision, largest, 8 * columns, columns) <= 227 * 1024
            assert 0 < emulation.shared_bytes(direction, precision, largest * 27 // 32, 8, columns) <= 163 * 1024
    assert max(emulation.shared_bytes(direction, "bf16", 4096, 1, columns) for columns in (1, 2)) == 0


# What surrounds the recurrence: all rows at once


@pytest.mark.parametrize("H, precision", [(16, "bf16"), (6, "tf32"), (33, "f16"), (300, "bf16")])
@pytest.mark.parametrize("lengths", [None, (4, 4, 3, 3, 3, 2, 1, 1, 1, 1)])
def test_previous_states(emulation: ModuleType, H: int, precision: str, lengths: tuple[int, ...] | None) -> None:
    layer = Layer(Problem(precision, H=H, T=4, B=10, D=2, lengths=lengths))
    output = torch.randn(layer.rows, 2, H).to(layer.dtype)
    previous = torch.full_like(output, torch.nan)
    hx = layer.hx.to(layer.dtype)
    emulation.previous_states(4, raw(output), raw(hx), raw(layer.table), raw(previous))
    assert torch.equal(previous, layer.previous(output))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("H, precision", [(7, "bf16"), (600, "f16"), (33, "tf32")])
def test_gates_made_again(emulation: ModuleType, H: int, precision: str, bias: bool) -> None:
    dtype = DTYPES[precision]
    i, g = (torch.randn(3, 2, 3 * H).to(dtype) for _ in range(2))
    b_ih, b_hh = (torch.randn(2, 3 * H).to(dtype) if bias else None for _ in range(2))
    gates = torch.full((2, 3, 4, gate_stride(H)), torch.nan, dtype=dtype)
    emulation.gates(precision, raw(i), raw(g), raw(b_ih), raw(b_hh), raw(gates))
    i, g = (t.double() if b is None else t.double() + b.double() for t, b in ((i, b_ih), (g, b_hh)))
    (i_r, i_z, i_n), (g_r, g_z, g_n) = i.chunk(3, 2), g.chunk(3, 2)
    r, z = torch.sigmoid(i_r + g_r), torch.sigmoid(i_z + g_z)
    want = torch.stack([r, z, torch.tanh(i_n + r * g_n), g_n], 2).transpose(0, 1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gates[..., :H].double(), want, rtol=eps, atol=eps)
    padding = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=dtype)[:, None]
    assert torch.equal(gates[..., H:], padding.expand(2, 3, 4, gate_stride(H) - H))
