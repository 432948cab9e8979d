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


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the emulation with")
    return load("grid_emulation")


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
    Problem("f16", H=17, B=9, D=2, bias=False, each_direction=True, seed=4),
    Problem("tf32", H=31, B=17, column_tiles=2, grad_h_n=False, seed=5),
    Problem("bf16", H=48, B=19, D=2, T=6, column_tiles=2, lengths=(6,) * 10 + (5, 4, 4, 3, 2, 2, 1, 1, 1), seed=6),
    Problem("bf16", H=1, B=1, T=1, seed=7),
    # More warps than blocks of h, and fewer; more weights than registers hold.
    Problem("f16", H=150, T=2, B=2, seed=8),
    Problem("tf32", H=600, T=2, B=1, column_tiles=2, seed=9),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_parity(emulation: ModuleType, problem: Problem) -> None:
    Layer(problem).assert_parity(emulation)


def test_same_bits_whatever_the_order(emulation: ModuleType) -> None:
    results = []
    for seed in range(9):
        layer = Layer(Problem("f16", H=33, T=9))
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
    layer = Layer(Problem(H=33, T=12, B=2))
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
