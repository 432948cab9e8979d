"""The GRU, every problem and peer: ``pytest benchmarks``, with all that pytest-benchmark offers.

Groups are problems; a peer that is not installed is skipped with the line that installs it, a GPU that is not there
with the reason. Nothing is timed before its output, or every gradient, has been compared with torch.nn.GRU in float64.
Ratios from here are between blocks that ran one after the other; ``benchmarks/cpu_gru.py`` runs the peers in turn,
which is what the published table needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import gru_case
from peers import PeerMissingError
from peers_gru import gru_peers
from problems import CPU_GRU, CUDA_GRU, Problem

NO_GPU = pytest.param("cuda", "", None, "", marks=pytest.mark.skip(reason="torch finds no GPU"), id="cuda")
#: Steps that take some memory, beside torch and what it holds anyway.
LARGE = CPU_GRU[-4:]


def cases(training: bool) -> list[Any]:
    """Device, dtype, problem and peer of every benchmark on this machine."""
    found: list[Any] = [("cpu", "float32", p, peer) for p in CPU_GRU for peer in gru_peers("cpu", training)]
    if not torch.cuda.is_available():
        return [*found, NO_GPU]
    for dtype in ("bfloat16", "float16", "float32"):
        found += [("cuda", dtype, p, peer) for p in CUDA_GRU for peer in gru_peers("cuda", training)]
    return found


@pytest.mark.parametrize("device, dtype, problem, peer", cases(training=False), ids=str)
def test_forward(timed: Callable[..., None], device: str, dtype: str, problem: Problem, peer: str) -> None:
    case = gru_case(problem, device, dtype)
    try:
        function = gru_peers(device, training=False)[peer](case.gru, case.x)
    except PeerMissingError as error:
        pytest.skip(f"{peer}: {error}")
    with torch.no_grad():  # what it compares with is used for training, too
        error = case.check(peer, function)
    with torch.inference_mode():
        timed(
            function,
            problem=problem,
            device=device,
            dtype=dtype,
            peer=peer,
            training=False,
            of_allowed_error=error,
        )


@pytest.mark.parametrize("device, dtype, problem, peer", cases(training=True), ids=str)
def test_forward_and_backward(timed: Callable[..., None], device: str, dtype: str, problem: Problem, peer: str) -> None:
    case = gru_case(problem, device, dtype)
    try:
        step = gru_peers(device, training=True)[peer](case.gru, case.x, case.grad)
    except PeerMissingError as error:
        pytest.skip(f"{peer}: {error}")
    error = case.check_gradients(peer, step)
    timed(
        step,
        problem=problem,
        device=device,
        dtype=dtype,
        peer=peer,
        training=True,
        of_allowed_error=error,
        weighed=problem in LARGE,
    )
