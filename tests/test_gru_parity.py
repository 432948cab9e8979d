"""The numeric rule of fastgru.testing: forward and every gradient, over problems in which all pairs of values occur."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastgru.testing import GruProblem, assert_parity, pairwise, parity

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FACTORS: dict[str, list[Any]] = {
    "H": [1, 7, 64, 100, 257],
    "I": [1, 7, 64, 100, 257],
    "dtype": DTYPES,
    "T": [1, 2, 9],
    "B": [1, 3, 17],
    "num_layers": [1, 2, 3],
    "bidirectional": [False, True],
    "bias": [False, True],
    "batch_first": [False, True],
    "packed": [False, True],
    "hx": [False, True],
}


SELECTION = [GruProblem(**case, seed=seed) for seed, case in enumerate(pairwise(FACTORS))]
LARGER = [
    GruProblem(T=65, B=33, I=48, H=96, bidirectional=True),
    GruProblem(T=40, B=21, I=256, H=320, packed=True),
    GruProblem(T=300, B=1, I=32, H=128),
    GruProblem(T=33, B=16, I=128, H=257, dtype=torch.bfloat16),
    GruProblem(T=12, B=130, I=16, H=33, bidirectional=True, packed=True),
]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("problem", SELECTION + LARGER, ids=str)
def test_outputs_and_gradients(engine: str, problem: GruProblem) -> None:
    assert_parity(problem)


# Few hidden units: computed by rows of the batch, or, with more inputs or fewer rows, by units.
FEW = [
    GruProblem(T=1, B=150, I=1, H=1),
    GruProblem(T=6, B=150, I=33, H=3, bidirectional=True, packed=True),
    GruProblem(T=6, B=37, I=128, H=8, num_layers=2, bidirectional=True, bias=False),
    GruProblem(T=20, B=20, I=2, H=5, batch_first=True, packed=True, hx=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save_gates", [True, False])
@pytest.mark.parametrize("problem", FEW, ids=str)
def test_few_units(engine: str, problem: GruProblem, save_gates: bool, dtype: torch.dtype) -> None:
    assert_parity(replace(problem, dtype=dtype), save_gates)


# Torch sums a product of few columns in the lanes of a vector, which is more exact than a chain as long as the input.
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inputs", [130, 257])
def test_few_units_of_many_inputs(engine: str, inputs: int, packed: bool, bidirectional: bool) -> None:
    assert_parity(GruProblem(T=33, B=9, I=inputs, H=2, packed=packed, bidirectional=bidirectional))


# The largest error of a recurrence of one unit is that of the draw that amplifies rounding most: which implementation
# meets it is luck. What is not is the mean over draws.
@pytest.mark.parametrize("sizes", [(8, 1), (64, 1), (130, 1), (130, 2), (1, 8)], ids=str)
def test_few_units_in_the_geometric_mean(engine: str, sizes: tuple[int, int]) -> None:
    problem = GruProblem(T=33, B=9, I=sizes[0], H=sizes[1], packed=True)
    logs: dict[str, list[float]] = {}
    for seed in range(48):
        for comparison in parity(replace(problem, seed=seed), draws=1):
            if comparison.error and comparison.torch_error:
                logs.setdefault(comparison.name, []).append(math.log(comparison.error / comparison.torch_error))
    assert {name: mean for name, found in logs.items() if (mean := math.exp(sum(found) / len(found))) > 2} == {}


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gates_recomputed_in_backward(backend: str, dtype: torch.dtype, packed: bool) -> None:
    assert_parity(GruProblem(H=20, num_layers=2, bidirectional=True, packed=packed, dtype=dtype), save_gates=False)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("problem", LARGER, ids=str)
def test_with_threads(backend: str, problem: GruProblem, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        assert_parity(problem)
    finally:
        torch.set_num_threads(1)
