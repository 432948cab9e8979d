"""Launches the recurrence of a GRU layer in CUDA C++, with the kernels of ``csrc/cuda``.

The whole recurrence is one launch that keeps W_hh on chip, spread over a cluster of blocks or over the whole grid; the
compiled library chooses between the two. What neither can run it refuses, with the reason, and so does a launch that
the GPU turns down: asked for by name that raises BackendUnavailable; else the problem goes to the next backend, which
says why once. The saved gates are laid out as Triton's and the reference's, so that either can take over at any point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgru.backends import measured, registry
from fastgru.ops.gru import recurrence

#: Who takes over what a launch turns down: their gates are laid out alike.
SUCCESSORS = ("triton", "reference")

# What launches have turned down, and why; see _key.
_turned_down: dict[tuple[Any, ...], str] = {}


class _Refused(Exception):  # noqa: N818 (nothing is wrong yet)
    """A launch that did not take place, and why."""


def _aligned(t: Tensor | None) -> Tensor | None:
    """The kernels load 16 bytes at a time, and a view may begin anywhere."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


def _raise_if(refused: str) -> None:
    if refused:
        raise _Refused(refused)


class _Kernels:
    """See :class:`fastgru.ops.gru.recurrence.Kernels`.

    ``loop`` names the recurrence's kernel, "cluster" or "grid"; empty, the library chooses.
    """

    loop = ""

    def upload(self, table: Tensor, device: torch.device) -> Tensor:
        on_device = torch.empty_like(table, device=device)
        # As arguments of launches: no copy waits for the GPU, and a CUDA graph can hold them.
        torch.ops.fastgru.cuda_upload(table, on_device)
        return on_device

    def forward(
        self, layer: recurrence.Layer, projected: Tensor, output: Tensor, h_n: Tensor, gates: Tensor | None
    ) -> None:
        refused = torch.ops.fastgru.cuda_gru_loop_forward(
            projected, _aligned(layer.w_hh), _aligned(layer.b_ih), _aligned(layer.b_hh), _aligned(layer.hx),
            layer.table, len(layer.sizes), recurrence.tf32(), self.loop, output, h_n, gates,
        )  # fmt: skip
        _raise_if(refused)

    def previous_states(self, layer: recurrence.Layer, output: Tensor, previous: Tensor) -> None:
        torch.ops.fastgru.cuda_gru_previous_states(
            _aligned(output), _aligned(layer.hx), layer.table, len(layer.sizes), previous
        )

    def gates(self, layer: recurrence.Layer, projected: Tensor, recurrent: Tensor, gates: Tensor) -> None:
        torch.ops.fastgru.cuda_gru_gates(projected, recurrent, layer.b_ih, layer.b_hh, gates)

    def backward(
        self,
        layer: recurrence.Layer,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        previous: Tensor,
        gates: Tensor,
        grad_gates: Tensor,
        grad_hx: Tensor,
    ) -> None:
        refused = torch.ops.fastgru.cuda_gru_loop_backward(
            _aligned(grad_output), _aligned(grad_h_n), _aligned(layer.w_hh), previous, _aligned(gates), layer.table,
            len(layer.sizes), recurrence.tf32(), self.loop, grad_gates, grad_hx,
        )  # fmt: skip
        _raise_if(refused)


KERNELS = _Kernels()
operators = recurrence.Operators(KERNELS)


def _or_the_next(kind: str) -> Callable[..., Any]:
    """An operator that hands to the next backend what is refused, unless this one was asked for by name."""

    def run(*arguments: Any) -> Any:
        try:
            return getattr(operators, kind)(*arguments)
        except _Refused as refused:
            hx: Tensor = arguments[3 if kind == "backward" else 1]
            _turned_down[_key(hx.device, hx.dtype, hx.size(2), hx.size(1), hx.size(0))] = str(refused)
            successor = registry.fall_back("cuda", SUCCESSORS, hx.device, hx.dtype, str(refused))
            return getattr(torch.ops.fastgru, f"{successor.name}_gru_{kind}")(*arguments)

    return run


gru_infer, gru_train, gru_backward = (_or_the_next(kind) for kind in ("infer", "train", "backward"))


def _key(device: torch.device, dtype: torch.dtype, hidden: int, batch: int, directions: int) -> tuple[Any, ...]:
    return device.index, dtype, hidden, batch, directions, recurrence.tf32(), KERNELS.loop


@functools.lru_cache(maxsize=4096)
def _why_not(key: tuple[Any, ...]) -> str:
    return str(torch.ops.fastgru.cuda_gru_why_not(*key))


def refuses(device: torch.device, dtype: torch.dtype, sizes: registry.Sizes) -> str | None:
    key = _key(device, dtype, sizes.hidden, sizes.batch, sizes.directions)
    return _turned_down.get(key) or _why_not(key) or None


def wins(device: torch.device, dtype: torch.dtype, sizes: registry.Sizes | None) -> bool:
    return measured.wins("cuda", device, dtype, sizes)


# What torch.compiler.assume_constant_result does, which would import the compiler.
wins._dynamo_marked_constant = True  # type: ignore[attr-defined]
