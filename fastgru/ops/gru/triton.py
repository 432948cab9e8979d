"""Launches the recurrence of a GRU layer in Triton.

Where W_hh fits beside the working set of one program, a single launch runs the whole sequence; else there is one launch
per step, back to back, with nothing in between that waits for the GPU or asks for memory.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.backends import measured, registry
from fastgru.ops.gru import recurrence
from fastgru.ops.gru.reference import gate_stride, steps_of

# Said outright, because Triton's default changes from one release to the next.
_OPTIONS = {"enable_fp_fusion": True}
# Columns per program of the kernels that only move or map rows.
_COPY_BLOCK = 64

# The widest block of hidden units (a power of two) whose W_hh one program holds.
_RESIDENT = {
    (torch.bfloat16, "tf32"): 128,
    (torch.float16, "tf32"): 128,
    (torch.float32, "tf32"): 64,
    (torch.float32, "ieee"): 64,
}


class Plan(NamedTuple):
    """How a recurrence is launched."""

    resident: bool
    constants: dict[str, Any]
    options: dict[str, Any]


def plan(hidden: int, batch: int, directions: int, dtype: torch.dtype, tf32: bool) -> Plan:
    """Block sizes by the size of the problem, T excepted. B only chooses between a few tiles, so that no new batch
    size makes Triton compile again unless it needs another tile."""
    precision = "ieee" if dtype == torch.float32 and not tf32 else "tf32"
    constants: dict[str, Any] = {
        "H": hidden,
        "D": directions,
        "GATE_STRIDE": gate_stride(hidden),
        "PRECISION": precision,
    }
    width = max(16, 1 << (hidden - 1).bit_length())
    # A compute unit of AMD's has 64 KiB of local memory, where a multiprocessor has 163 at the least.
    if width <= _RESIDENT[dtype, precision] // (1 if torch.version.hip is None else 2):
        constants |= {"BLOCK_B": 16, "BLOCK_H": width}
        warps = max(4, width * dtype.itemsize // 32)
        return Plan(True, constants, {"num_warps": warps, "num_stages": 1, **_OPTIONS})
    # More rows of exact float32, which is computed without matrix instructions, do not fit in registers.
    rows = 16 if batch <= 16 else 32 if batch <= 32 or precision == "ieee" else 64
    constants |= {"BLOCK_B": rows, "BLOCK_H": 16 if batch <= 64 else 32, "BLOCK_K": 128 // dtype.itemsize}
    return Plan(False, constants, {"num_warps": 8 if rows == 64 else 4, "num_stages": 3, **_OPTIONS})


@functools.cache
def _module(name: str) -> ModuleType:
    """A module of kernels. They need Triton, which ``import fastgru`` must not load."""
    return importlib.import_module(f"fastgru.kernels.{name}")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _on_device(layer: recurrence.Layer) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(layer.hx.device) if layer.hx.is_cuda else nullcontext()


def _plan(layer: recurrence.Layer) -> Plan:
    return plan(layer.hidden, layer.batch, layer.directions, layer.hx.dtype, recurrence.tf32())


def each_step(layer: recurrence.Layer, kernel: Any, tensors: tuple[Any, ...], plan: Plan, backward: bool) -> None:
    """Launches a kernel once per step; it is looked up only the first time."""
    orders = [list(steps_of(layer.sizes, reverse=direction == 1)) for direction in range(layer.directions)]
    if backward:
        orders = [[*reversed(order), (0, 0)] for order in orders]
    # Per launch: (row, size) of the step and of the one before it, for each of two directions.
    pairs = [[(*now, *last) for now, last in zip(order, [(0, 0), *order], strict=False)] for order in orders]
    scalars = zip(pairs[0], pairs[-1], strict=True)
    grid = (
        _ceil_div(layer.batch, plan.constants["BLOCK_B"]),
        _ceil_div(layer.hidden, plan.constants["BLOCK_H"]),
        layer.directions,
    )
    launch: Any = None
    for forward, reverse in scalars:
        arguments = (*tensors, layer.batch, layer.rows, *forward, *reverse)
        if launch is None:
            compiled = kernel[grid](*arguments, **plan.constants, **plan.options)
            if compiled is not None:  # None from the interpreter
                launch = functools.partial(compiled[grid], stream=torch.cuda.current_stream().cuda_stream)
                constants = [plan.constants[name] for name in kernel.arg_names if name in plan.constants]
        else:
            launch(*arguments, *constants)


class _Kernels:
    """See :class:`fastgru.ops.gru.recurrence.Kernels`."""

    def upload(self, table: Tensor, device: torch.device) -> Tensor:
        return table.to(device, non_blocking=True)

    def forward(
        self, layer: recurrence.Layer, projected: Tensor, output: Tensor, h_n: Tensor, gates: Tensor | None
    ) -> None:
        how = _plan(layer)
        given = (projected, layer.w_hh, layer.b_ih, layer.b_hh, layer.hx)
        kernels = _module("gru.forward")
        with _on_device(layer):
            if how.resident:
                kernels.gru_forward_resident[(_ceil_div(layer.batch, how.constants["BLOCK_B"]), layer.directions)](
                    *given, layer.table, output, h_n, gates, len(layer.sizes), layer.batch, layer.rows,
                    **how.constants, **how.options,
                )  # fmt: skip
            else:
                state = layer.hx.to(torch.float32, copy=True)
                each_step(layer, kernels.gru_forward_step, (*given, state, output, gates), how, backward=False)
                h_n.copy_(state)

    def previous_states(self, layer: recurrence.Layer, output: Tensor, previous: Tensor) -> None:
        steps = len(layer.sizes)
        with _on_device(layer):
            _module("gru.backward").gru_previous_states[(steps, _ceil_div(layer.batch, 16), layer.directions)](
                output, layer.hx, layer.table, previous, layer.batch, steps,
                H=layer.hidden, D=layer.directions, BLOCK_B=16, BLOCK_H=_COPY_BLOCK, **_OPTIONS,
            )  # fmt: skip

    def gates(self, layer: recurrence.Layer, projected: Tensor, recurrent: Tensor, gates: Tensor) -> None:
        stride = gate_stride(layer.hidden)
        grid = (_ceil_div(layer.rows, 16), _ceil_div(stride, _COPY_BLOCK), layer.directions)
        with _on_device(layer):
            _module("gru.cell").gru_gates[grid](
                projected, recurrent, layer.b_ih, layer.b_hh, gates, layer.rows,
                H=layer.hidden, D=layer.directions, GATE_STRIDE=stride, BLOCK_N=16, BLOCK_H=_COPY_BLOCK, **_OPTIONS,
            )  # fmt: skip

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
        how = _plan(layer)
        kernels = _module("gru.backward")
        with _on_device(layer):
            if how.resident:
                kernels.gru_backward_resident[(_ceil_div(layer.batch, how.constants["BLOCK_B"]), layer.directions)](
                    grad_output, grad_h_n, layer.w_hh, previous, gates, layer.table, grad_gates, grad_hx,
                    len(layer.sizes), layer.batch, layer.rows, **how.constants, **how.options,
                )  # fmt: skip
            else:
                carry = torch.zeros_like(layer.hx, dtype=torch.float32)
                if grad_h_n is not None:
                    carry.copy_(grad_h_n)
                tensors = (grad_output, layer.w_hh, previous, gates, grad_gates, carry)
                each_step(layer, kernels.gru_backward_step, tensors, how, backward=True)
                grad_hx.copy_(carry)


operators = recurrence.Operators(_Kernels())


def wins(device: torch.device, dtype: torch.dtype, sizes: registry.Sizes | None) -> bool:
    return measured.wins("triton", device, dtype, sizes)


# What torch.compiler.assume_constant_result does, which would import the compiler.
wins._dynamo_marked_constant = True  # type: ignore[attr-defined]
