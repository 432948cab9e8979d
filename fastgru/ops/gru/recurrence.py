"""Computes a GRU layer around a recurrence on the GPU, for the backends ``triton`` and ``cuda``.

One layer: the input projection of all rows as one product; the recurrence; backwards a recurrence that leaves the
gradients of the gates, then the products over all rows, without atomics. What a backend brings is its ``Kernels``.
float32 products follow ``torch.backends.cuda.matmul.fp32_precision``, like torch.matmul.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastgru.ops.gru.reference import check_weights, gate_stride, step_sizes, without_gaps
from fastgru.ops.numerics import outside_autocast


def tf32() -> bool:
    """Whether torch allows float32 products on the GPU to round their operands to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _stack(forward: Tensor | None, reverse: Tensor | None) -> Tensor | None:
    if forward is None or reverse is None:
        return None if forward is None else forward.unsqueeze(0).contiguous()
    return torch.stack((forward, reverse))


class Layer:
    """What every pass needs of one layer: sizes, weights stacked by direction, and where the rows of each step are.

    Attributes:
        directions, batch, hidden, rows: D, B, H and N, the rows of all steps.
        sizes: the number of rows of each step.
        input: [N, I].
        hx: [D, B, H].
        w_ih: [D * 3H, I].
        w_hh: [D, 3H, H].
        b_ih, b_hh: [D, 3H] or None.
        table: None, or of a packed batch, int32 [T + 1 + B]: the first row of every step, and the end; then the steps
            of every batch row.
    """

    def __init__(self, kernels: Kernels, input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> None:
        *given, batch_sizes = weights_and_batch_sizes
        check_weights(input, hx, given)
        weights = without_gaps(given)
        self.directions, self.batch, self.hidden = hx.shape
        self.input = input.flatten(0, -2)
        self.rows = self.input.size(0)
        self.hx = hx.contiguous()
        w_ih, w_hh, self.b_ih, self.b_hh = (_stack(*pair) for pair in zip(weights[:4], weights[4:], strict=True))
        assert w_ih is not None and w_hh is not None
        self.w_ih, self.w_hh = w_ih.flatten(0, 1), w_hh
        self.sizes = step_sizes(input, hx, batch_sizes)
        self.table = None if batch_sizes is None else kernels.upload(self._table(), hx.device)

    def _table(self) -> Tensor:
        first = [0]
        for size in self.sizes:
            first.append(first[-1] + size)
        lengths: list[int] = []
        for step in range(len(self.sizes), 0, -1):
            lengths += [step] * (self.sizes[step - 1] - len(lengths))
        return torch.tensor(first + lengths, dtype=torch.int32)

    def project(self) -> Tensor:
        """x W_ih^T [N, D * 3H]."""
        return self.input @ self.w_ih.t()


class Kernels(Protocol):
    """What a backend launches. All tensors are contiguous and in the problem's dtype; no batch is empty."""

    def upload(self, table: Tensor, device: torch.device) -> Tensor:
        """An int32 vector of the host's, on the device."""

    def forward(self, layer: Layer, projected: Tensor, output: Tensor, h_n: Tensor, gates: Tensor | None) -> None:
        """The recurrence. Fills output [N, D * H], h_n [D, B, H] and gates [D, N, 4 * gate_stride(H)]: r, z, n and
        W_hn h + b_hn of each row, of which the padding too is always the same."""

    def previous_states(self, layer: Layer, output: Tensor, previous: Tensor) -> None:
        """Fills previous [N, D, H], the state before each row: the output of the step before, or hx."""

    def gates(self, layer: Layer, projected: Tensor, recurrent: Tensor, gates: Tensor) -> None:
        """Fills gates as ``forward`` does, from x W_ih^T and h W_hh^T, both [N, D * 3H]."""

    def backward(
        self,
        layer: Layer,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        previous: Tensor,
        gates: Tensor,
        grad_gates: Tensor,
        grad_hx: Tensor,
    ) -> None:
        """The recurrence backwards. Fills grad_hx [D, B, H] and grad_gates [N, 4 * D * H]: first the gradient of
        x W_ih^T, for r, z, n of each direction, then of W_hn h of each."""


class Operators:
    """The operators of a backend; arguments and results as ``fastgru.ops.gru.schema`` has them.

    All of them raise RuntimeError where batch_sizes do not describe the packed input.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    @outside_autocast
    def _forward(
        self, save_gates: bool, input: Tensor, hx: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        layer = Layer(self.kernels, input, hx, *rest)
        directions, _, hidden = hx.shape
        # Not a view, which autograd would not let a caller overwrite.
        output = input.new_empty(*input.shape[:-1], directions * hidden)
        gates = input.new_empty(directions, layer.rows, 4 * gate_stride(hidden)) if save_gates else None
        h_n = torch.empty_like(layer.hx)
        if h_n.numel():
            self.kernels.forward(layer, layer.project(), output.view(layer.rows, directions * hidden), h_n, gates)
        return output, h_n, gates

    def infer(self, input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer."""
        output, h_n, _ = self._forward(False, input, hx, *weights_and_batch_sizes)
        return output, h_n

    def train(
        self, input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`infer`, and also returns the gates [D, N, 4 * gate_stride(H)] its backward needs."""
        output, h_n, gates = self._forward(True, input, hx, *weights_and_batch_sizes)
        assert gates is not None
        return output, h_n, gates

    @outside_autocast
    def backward(
        self, grad_output: Tensor | None, grad_h_n: Tensor | None, input: Tensor, hx: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of one layer. Without gates one product over all rows makes them again."""
        *weights_and_batch_sizes, output, gates, need_input_grad, need_weight_grad = rest
        layer = Layer(self.kernels, input, hx, *weights_and_batch_sizes)
        directions, _, hidden = hx.shape
        by_row = (layer.rows, directions * hidden)
        grad_output = None if grad_output is None else grad_output.reshape(by_row).contiguous()
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        previous = input.new_empty(layer.rows, directions, hidden)
        grad_gates = input.new_empty(layer.rows, 4 * directions * hidden)
        grad_hx = torch.empty_like(layer.hx)
        if grad_hx.numel():
            self.kernels.previous_states(layer, output.reshape(by_row).contiguous(), previous)
            if gates is None:
                gates = self._recompute_gates(layer, previous)
            self.kernels.backward(layer, grad_output, grad_h_n, previous, gates, grad_gates, grad_hx)

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

    def _recompute_gates(self, layer: Layer, previous: Tensor) -> Tensor:
        directions, _, hidden = layer.hx.shape
        recurrent = previous.new_empty(layer.rows, directions, 3 * hidden)
        for direction in range(directions):
            torch.mm(previous[:, direction], layer.w_hh[direction].t(), out=recurrent[:, direction])
        gates = recurrent.new_empty(directions, layer.rows, 4 * gate_stride(hidden))
        self.kernels.gates(layer, layer.project(), recurrent, gates)
        return gates
