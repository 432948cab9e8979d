"""The GRU on the CPU, every problem and peer: ``pytest benchmarks``, with all that pytest-benchmark offers.

Groups are problems; a peer that is not installed is skipped with the line that installs it. Nothing is timed before its
output has been compared with torch.nn.GRU in float64. Ratios from here are between blocks that ran one after the other;
``benchmarks/cpu_gru.py`` runs the peers in turn, which is what the published table needs.
"""

from __future__ import annotations

import pytest
import torch
from cpu_gru import check
from peers import FORWARD, TRAINING, PeerMissingError
from problems import CPU_GRU, Problem
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn


def _problem(problem: Problem) -> tuple[nn.GRU, torch.Tensor]:
    torch.manual_seed(0)
    return nn.GRU(problem.I, problem.H), torch.randn(problem.T, problem.B, problem.I)


@pytest.mark.parametrize("peer", FORWARD)
@pytest.mark.parametrize("problem", CPU_GRU, ids=str)
def test_forward(benchmark: BenchmarkFixture, problem: Problem, peer: str) -> None:
    benchmark.group = f"forward {problem}"
    gru, x = _problem(problem)
    try:
        function = FORWARD[peer](gru, x)
    except PeerMissingError as error:
        pytest.skip(str(error))
    check(function, gru, x)
    benchmark(function)


@pytest.mark.parametrize("peer", TRAINING)
@pytest.mark.parametrize("problem", CPU_GRU, ids=str)
def test_forward_and_backward(benchmark: BenchmarkFixture, problem: Problem, peer: str) -> None:
    benchmark.group = f"forward + backward {problem}"
    gru, x = _problem(problem)
    grad = torch.randn(problem.T, problem.B, problem.H)
    want, got = TRAINING["nn.GRU"](gru, x, grad)(), TRAINING[peer](gru, x, grad)()
    for theirs, ours in zip(want, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    benchmark(TRAINING[peer](gru, x, grad))
