"""The GRU in Triton: the kernels of ``fastgru.kernels``, and the large products around them by torch.matmul.

One layer: the input projection of all rows as one product; the recurrence; backwards a recurrence that leaves the
gradients of the gates, then the products over all rows. Where W_hh fits beside the working set of one program, a single
launch runs the whole sequence; else there is one launch per step, back to back, with nothing in between that waits for
the GPU or asks for memory. float32 products follow ``torch.backends.cuda.matmul.fp32_precision``, like torch.matmul.

Triton is imported at the first call. ``TRITON_INTERPRET=1``, Triton's own variable, also admits CPU tensors: the
kernels then run in its interpreter, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.backends import gpu_table, registry
from fastgru.backends.reference import gate_stride, outside_autocast, step_sizes, steps_of

#: The oldest Triton whose language the kernels are written in.
OLDEST = (3, 6)

#: True where the kernels run on the CPU, in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
def _missing() -> str | None:
    """None when a Triton new enough is installed, else what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    installed: str = importlib.import_module("triton").__version__
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton {installed} is installed and {oldest} is the oldest it works with; pip install --upgrade triton"
    return None


@functools.cache
def _available() -> str | None:
    if (missing := _missing()) is not None:
        return missing
    if INTERPRETED:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only; install a build for your GPU, see https://pytorch.org"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; check the driver, and CUDA_VISIBLE_DEVICES"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU is of compute capability {major}.{minor} and 8.0 is the oldest it works with"
    return None


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"it has no kernels for {dtype}"


@functools.cache
def _module(name: str) -> ModuleType:
    """A module of kernels. They need Triton, which ``import fastgru`` must not load."""
    return importlib.import_module(f"fastgru.kernels.{name}")


def _wins(device: torch.device, dtype: torch.dtype, sizes: registry.Sizes | None) -> bool:
    return device.type == "cuda" and gpu_table.triton_wins(
        gpu_table.architecture(device), gpu_table.precision(dtype), sizes
    )


# What torch.compiler.assume_constant_result does, which would import the compiler.
_wins._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class _Layer:
    """What both passes need of one layer: sizes, weights stacked by direction, and where the rows of each step are."""

    def __init__(self, input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> None:
        *weights, batch_sizes = weights_and_batch_sizes
        self.directions, self.batch, self.hidden = hx.shape
        self.input = input.reshape(-1, input.size(-1))
        self.rows = self.input.size(0)
        self.hx = hx.contiguous()
        w_ih, w_hh, self.b_ih, self.b_hh = (self._stack(*pair) for pair in zip(weights[:4], weights[4:], strict=True))
        assert w_ih is not None and w_hh is not None
        self.w_ih, self.w_hh = w_ih.flatten(0, 1), w_hh
        self.sizes = step_sizes(input, hx, batch_sizes)
        self.table = None if batch_sizes is None else self._table()

    @staticmethod
    def _stack(forward: Tensor | None, reverse: Tensor | None) -> Tensor | None:
        if forward is None or reverse is None:
            return None if forward is None else forward.unsqueeze(0).contiguous()
        return torch.stack((forward, reverse))

    def _table(self) -> Tensor:
        """What the kernels call ``rows``: first row of every step, and the end; then the steps of every batch row."""
        first = [0]
        for size in self.sizes:
            first.append(first[-1] + size)
        lengths: list[int] = []
        for step in range(len(self.sizes), 0, -1):
            lengths += [step] * (self.sizes[step - 1] - len(lengths))
        return torch.tensor(first + lengths, dtype=torch.int32).to(self.hx.device, non_blocking=True)

    def plan(self) -> Plan:
        return plan(self.hidden, self.batch, self.directions, self.hx.dtype, _tf32())

    def tiles(self, block: int) -> int:
        return _ceil_div(self.batch, block)

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.hx.device) if self.hx.is_cuda else nullcontext()

    def project(self) -> Tensor:
        """x W_ih^T [N, D * 3H]."""
        return self.input @ self.w_ih.t()

    def each_step(self, kernel: Any, tensors: tuple[Tensor | None, ...], plan: Plan, backward: bool) -> None:
        """Launches a kernel once per step; it is looked up only the first time."""
        orders = [list(steps_of(self.sizes, reverse=direction == 1)) for direction in range(self.directions)]
        if backward:
            orders = [[*reversed(order), (0, 0)] for order in orders]
        # Per launch: (row, size) of the step and of the one before it, for each of two directions.
        pairs = [[(*now, *last) for now, last in zip(order, [(0, 0), *order], strict=False)] for order in orders]
        scalars = zip(pairs[0], pairs[-1], strict=True)
        grid = (
            self.tiles(plan.constants["BLOCK_B"]),
            _ceil_div(self.hidden, plan.constants["BLOCK_H"]),
            self.directions,
        )
        launch: Any = None
        for forward, reverse in scalars:
            arguments = (*tensors, self.batch, self.rows, *forward, *reverse)
            if launch is None:
                compiled = kernel[grid](*arguments, **plan.constants, **plan.options)
                if compiled is not None:  # None from the interpreter
                    launch = functools.partial(compiled[grid], stream=torch.cuda.current_stream().cuda_stream)
                    constants = [plan.constants[name] for name in kernel.arg_names if name in plan.constants]
            else:
                launch(*arguments, *constants)


def _forward(save_gates: bool, input: Tensor, hx: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    layer = _Layer(input, hx, *rest)
    directions, batch, hidden = hx.shape
    projected = layer.project()
    output = input.new_empty(layer.rows, directions * hidden)
    gates = input.new_empty(directions, layer.rows, 4 * gate_stride(hidden)) if save_gates else None
    how = layer.plan()
    h_n = torch.empty_like(layer.hx)
    state = None if how.resident else layer.hx.to(torch.float32, copy=True)
    if batch:
        with layer.on_device():
            kernels = _module("gru_fwd")
            given = (projected, layer.w_hh, layer.b_ih, layer.b_hh, layer.hx)
            if state is None:
                kernels.gru_forward_resident[(layer.tiles(how.constants["BLOCK_B"]), directions)](
                    *given, layer.table, output, h_n, gates, len(layer.sizes), batch, layer.rows,
                    **how.constants, **how.options,
                )  # fmt: skip
            else:
                layer.each_step(kernels.gru_forward_step, (*given, state, output, gates), how, backward=False)
    if state is not None:
        h_n.copy_(state)
    return output.view(*input.shape[:-1], directions * hidden), h_n, gates


@outside_autocast
def gru_infer(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """One layer; arguments and results as the operators in ``fastgru.ops.schema`` have them.

    Raises:
        RuntimeError: batch_sizes do not describe the packed input.
    """
    output, h_n, _ = _forward(False, input, hx, *weights_and_batch_sizes)
    return output, h_n


@outside_autocast
def gru_train(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gru_infer`, and also returns the gates [D, N, 4 * gate_stride(H)] its backward needs."""
    output, h_n, gates = _forward(True, input, hx, *weights_and_batch_sizes)
    assert gates is not None
    return output, h_n, gates


def _recompute_gates(layer: _Layer, previous: Tensor) -> Tensor:
    directions, _, hidden = layer.hx.shape
    recurrent = torch.empty(layer.rows, directions, 3 * hidden, dtype=layer.hx.dtype, device=layer.hx.device)
    for direction in range(directions):
        torch.mm(previous[:, direction], layer.w_hh[direction].t(), out=recurrent[:, direction])
    stride = gate_stride(hidden)
    gates = recurrent.new_empty(directions, layer.rows, 4 * stride)
    grid = (_ceil_div(layer.rows, 16), _ceil_div(stride, _COPY_BLOCK), directions)
    _module("gru_cell").gru_gates[grid](
        layer.project(), recurrent, layer.b_ih, layer.b_hh, gates, layer.rows,
        H=hidden, D=directions, GATE_STRIDE=stride, BLOCK_N=16, BLOCK_H=_COPY_BLOCK, **_OPTIONS,
    )  # fmt: skip
    return gates


@outside_autocast
def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one layer; arguments and results as the operators in ``fastgru.ops.schema`` have them.

    Without gates one product over all rows makes them again.
    """
    *weights_and_batch_sizes, output, gates, need_input_grad, need_weight_grad = rest
    layer = _Layer(input, hx, *weights_and_batch_sizes)
    directions, batch, hidden = hx.shape
    grad_output = None if grad_output is None else grad_output.contiguous()
    grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
    previous = input.new_empty(layer.rows, directions, hidden)
    grad_gates = input.new_empty(layer.rows, 4 * directions * hidden)
    grad_hx = torch.empty_like(layer.hx)
    how = layer.plan()
    carry = None if how.resident else torch.zeros_like(layer.hx, dtype=torch.float32)
    if carry is not None and grad_h_n is not None:
        carry.copy_(grad_h_n)
    if batch:
        with layer.on_device():
            kernels = _module("gru_bwd")
            kernels.gru_previous_states[(len(layer.sizes), layer.tiles(16), directions)](
                output, layer.hx, layer.table, previous, batch, len(layer.sizes),
                H=hidden, D=directions, BLOCK_B=16, BLOCK_H=_COPY_BLOCK, **_OPTIONS,
            )  # fmt: skip
            if gates is None:
                gates = _recompute_gates(layer, previous)
            if carry is None:
                kernels.gru_backward_resident[(layer.tiles(how.constants["BLOCK_B"]), directions)](
                    grad_output, grad_h_n, layer.w_hh, previous, gates, layer.table, grad_gates, grad_hx,
                    len(layer.sizes), batch, layer.rows, **how.constants, **how.options,
                )  # fmt: skip
            else:
                tensors = (grad_output, layer.w_hh, previous, gates, grad_gates, carry)
                layer.each_step(kernels.gru_backward_step, tensors, how, backward=True)
    if carry is not None:
        grad_hx.copy_(carry)

    grad_i, grad_g = grad_gates.split([3 * directions * hidden, directions * hidden], dim=1)
    grad_input = (grad_i @ layer.w_ih).view(input.shape) if need_input_grad else input.new_empty(0)
    if not need_weight_grad:
        return grad_input, grad_hx, *(input.new_empty(0) for _ in range(4))  # type: ignore[return-value]
    grad_w_ih = (grad_i.t() @ layer.input).view(directions, 3 * hidden, layer.input.size(1))
    grad_w_hh = torch.empty_like(layer.w_hh)
    for direction in range(directions):
        h = previous[:, direction]
        rz, n = grad_w_hh[direction].split([2 * hidden, hidden])
        torch.mm(grad_i[:, 3 * hidden * direction :][:, : 2 * hidden].t(), h, out=rz)
        torch.mm(grad_g[:, hidden * direction :][:, :hidden].t(), h, out=n)
    sums = grad_gates.sum(0, dtype=torch.float32).to(input.dtype)
    i_sums, g_sums = sums[: 3 * directions * hidden].view(directions, 3 * hidden), sums[3 * directions * hidden :]
    grad_b_hh = torch.cat((i_sums[:, : 2 * hidden], g_sums.view(directions, hidden)), dim=1)
    return grad_input, grad_hx, grad_w_ih, grad_w_hh, i_sums.clone(), grad_b_hh


registry.register(
    registry.Backend(
        name="triton",
        devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
        priority=60,
        available=_available,
        supports=_supports,
        wins=_wins,
    )
)
