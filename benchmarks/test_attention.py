"""Attention, every shape and peer: ``pytest benchmarks``. Correctness is checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import attention_case
from peers import PeerMissingError
from peers_attention import attention_peers
from problems import CPU_ATTENTION, CUDA_ATTENTION, Attention
from test_gru import NO_GPU

DEVICES = {"cpu": (("float32", "bfloat16"), CPU_ATTENTION), "cuda": (("float16", "bfloat16"), CUDA_ATTENTION)}


def cases(training: bool) -> list[Any]:
    """Device, dtype, shape and peer of every benchmark on this machine."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found: list[Any] = [
        (device, dtype, shape, peer)
        for device in devices
        for dtype in DEVICES[device][0]
        for shape in DEVICES[device][1]
        for peer in attention_peers(device, dtype, training)
    ]
    return found if "cuda" in devices else [*found, NO_GPU]


@pytest.mark.parametrize("device, dtype, shape, peer", cases(training=False), ids=str)
def test_forward(timed: Callable[..., None], device: str, dtype: str, shape: Attention, peer: str) -> None:
    case = attention_case(shape, device, dtype)
    try:
        attention = attention_peers(device, dtype, training=False)[peer](*case.inputs)
    except PeerMissingError as error:
        pytest.skip(f"{peer}: {error}")

    def forward() -> Any:
        with torch.inference_mode():
            return attention(*case.inputs)

    error = case.check(peer, forward)
    timed(forward, problem=shape, device=device, dtype=dtype, peer=peer, training=False, of_allowed_error=error)


@pytest.mark.parametrize("device, dtype, shape, peer", cases(training=True), ids=str)
def test_forward_and_backward(timed: Callable[..., None], device: str, dtype: str, shape: Attention, peer: str) -> None:
    case = attention_case(shape, device, dtype)
    inputs = tuple(t.detach().requires_grad_() for t in case.inputs)
    try:
        attention = attention_peers(device, dtype, training=True)[peer](*inputs)
    except PeerMissingError as error:
        pytest.skip(f"{peer}: {error}")

    def step() -> Any:
        return torch.autograd.grad(attention(*inputs), inputs, case.grad)

    error = case.check_gradients(peer, step)
    timed(
        step,
        problem=shape,
        device=device,
        dtype=dtype,
        peer=peer,
        training=True,
        of_allowed_error=error,
        weighed=dtype == "float32",
    )
