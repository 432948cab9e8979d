"""Computes the GRU in plain torch, on any device: the oracle, the fallback, and the path of double backward.

One layer, directions d < D. With i = x W_ih^T + b_ih and g = h W_hh^T + b_hh, split in the gates r, z, n:

    r = sigmoid(i_r + g_r)    z = sigmoid(i_z + g_z)    n = tanh(i_n + r * g_n)    h' = (1 - z) * n + z * h

Padded input is a packed sequence whose batch sizes are all B, so there is one code path: rows [N, ...] and the number
of rows of each step. bfloat16 and float16 are computed, and the state carried, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgru.ops.numerics import outside_autocast, wide


def gate_stride(hidden_size: int) -> int:
    """Columns one gate takes in the saved ``gates`` [D, N, 4 * gate_stride]."""
    return (hidden_size + 15) // 16 * 16


def without_gaps(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The eight weights of a layer where it has all its biases or none: one that is missing beside others is zero."""
    biases = (2, 3) if weights[4] is None else (2, 3, 6, 7)
    filled = list(weights)
    if any(weights[i] is not None for i in biases):
        for i in biases:
            matrix = weights[i // 4 * 4]
            if filled[i] is None and matrix is not None:
                filled[i] = matrix.new_zeros(matrix.size(0))
    return filled


def check_weights(input: Tensor, hx: Tensor, weights: Sequence[Tensor | None]) -> None:
    """For kernels that go by sizes alone.

    Raises:
        RuntimeError: a weight of another shape than input [..., I] and hx [D, B, H] ask for.
    """
    rows = 3 * hx.size(2)
    shapes = ((rows, input.size(-1)), (rows, hx.size(2)), (rows,), (rows,))
    for i, weight in enumerate(weights):
        if weight is not None and weight.shape != shapes[i % 4]:
            raise RuntimeError(f"expected a weight or bias of shape {list(shapes[i % 4])}, got {list(weight.shape)}")


def step_sizes(input: Tensor, hx: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """Number of rows of each step.

    Raises:
        RuntimeError: batch_sizes do not describe the packed input.
    """
    if batch_sizes is None:
        return [input.size(1)] * input.size(0)
    sizes: list[int] = batch_sizes.tolist()
    if sum(sizes) != input.size(0) or sizes[0] != hx.size(1) or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(
            f"batch_sizes must start at the batch size {hx.size(1)}, never grow, and sum to the {input.size(0)} rows "
            f"of the packed input, got {sizes}"
        )
    return sizes


def steps_of(sizes: list[int], reverse: bool) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each step, in the order of the recurrence."""
    row = sum(sizes) if reverse else 0
    for size in reversed(sizes) if reverse else sizes:
        row -= size if reverse else 0
        yield row, size
        row += 0 if reverse else size


def _directions(*weights: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(w_ih, w_hh, b_ih, b_hh) of each direction, widened."""
    widened = [None if weight is None else wide(weight) for weight in weights]
    groups = []
    for w_ih, w_hh, b_ih, b_hh in (widened[:4], widened[4:]):
        if w_ih is not None and w_hh is not None:
            groups.append((w_ih, w_hh, b_ih, b_hh))
    return groups


@outside_autocast
def _forward(
    input: Tensor, hx: Tensor, weights: tuple[Tensor | None, ...], batch_sizes: Tensor | None
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Output, h_n and, for each direction, (r, z, n, g_n) as [N, H]. Every operation is differentiable by autograd."""
    sizes = step_sizes(input, hx, batch_sizes)
    x = wide(input).flatten(0, -2)
    batch, hidden = hx.size(1), hx.size(2)
    outputs, states, gates = [], [], []
    for direction, (w_ih, w_hh, b_ih, b_hh) in enumerate(_directions(*weights)):
        projected = F.linear(x, w_ih, b_ih)
        h = wide(hx[direction])
        steps = []
        for row, size in steps_of(sizes, reverse=direction == 1):
            previous = h[:size]
            i_rz, i_n = projected[row : row + size].split([2 * hidden, hidden], dim=1)
            g_rz, g_n = F.linear(previous, w_hh, b_hh).split([2 * hidden, hidden], dim=1)
            r, z = torch.sigmoid(i_rz + g_rz).chunk(2, dim=1)
            n = torch.tanh(i_n + r * g_n)
            new = n + z * (previous - n)
            steps.append((new, r, z, n, g_n))
            h = new if size == batch else torch.cat([new, h[size:]])
        if direction == 1:
            steps.reverse()
        output, *saved = (torch.cat(pieces) for pieces in zip(*steps, strict=True))
        outputs.append(output)
        states.append(h)
        gates.append(tuple(saved))
    # No views, which autograd would not let a caller overwrite.
    output = torch.cat([piece.view(*input.shape[:-1], hidden) for piece in outputs], dim=-1)
    h_n = torch.cat([state.unsqueeze(0) for state in states])
    return output.to(input.dtype), h_n.to(input.dtype), gates


def gru_differentiable(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """One layer as a composite of torch operators, which autograd can differentiate any number of times.

    Args:
        input: [T, B, I], or packed [N, I].
        hx: [D, B, H].
        weights_and_batch_sizes: w_ih, w_hh, b_ih, b_hh, the same four of the reverse direction, and batch_sizes [T].

    Returns:
        output [T, B, D*H] or [N, D*H], and h_n [D, B, H].

    Raises:
        RuntimeError: batch_sizes do not describe the packed input.
    """
    *weights, batch_sizes = weights_and_batch_sizes
    output, h_n, _ = _forward(input, hx, tuple(weights), batch_sizes)
    return output, h_n


def gru_train(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gru_differentiable`, and also returns the gates [D, N, 4 * gate_stride(H)] its backward needs."""
    *weights, batch_sizes = weights_and_batch_sizes
    output, h_n, saved = _forward(input, hx, tuple(weights), batch_sizes)
    directions, _, hidden = hx.shape
    rows = saved[0][0].size(0)
    # Zeros, not empty: the padding columns are part of an operator's result and must be the same at every call.
    gates = input.new_zeros(directions, rows, 4, gate_stride(hidden))
    for direction, kinds in enumerate(saved):
        for kind, gate in enumerate(kinds):
            gates[direction, :, kind, :hidden] = gate
    return output, h_n, gates.flatten(2)


@outside_autocast
def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ih_reverse: Tensor | None,
    w_hh_reverse: Tensor | None,
    b_ih_reverse: Tensor | None,
    b_hh_reverse: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    gates: Tensor | None,
    need_input_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one layer: a loop for dh and the gate gradients, then large products over all rows at once.

    Conjugates, as autograd has them, are for complex tensors; of real ones they are the tensor itself.

    Without ``gates`` the forward pass is run again for them.

    Returns:
        grad_input, grad_hx [D, B, H], grad_w_ih [D, 3H, I], grad_w_hh [D, 3H, H], grad_b_ih and grad_b_hh [D, 3H]; a
        gradient not asked for has shape [0].
    """
    if gates is None:
        weights_and_sizes = (w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, batch_sizes)
        _, _, gates = gru_train(input, hx, w_ih, w_hh, b_ih, b_hh, *weights_and_sizes)
    sizes = step_sizes(input, hx, batch_sizes)
    x = wide(input).flatten(0, -2)
    directions, _, hidden = hx.shape
    wide_output = wide(output).reshape(x.size(0), directions, hidden)
    wide_gates = wide(gates).view(directions, x.size(0), 4, gate_stride(hidden))[..., :hidden]
    wide_grad = None if grad_output is None else wide(grad_output).reshape(x.size(0), directions, hidden)
    weights = _directions(w_ih, w_hh, b_ih, b_hh, w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse)

    grad_x = torch.zeros_like(x)
    per_direction = []
    for direction, (w_ih_d, w_hh_d, _, _) in enumerate(weights):
        order = list(steps_of(sizes, reverse=direction == 1))
        h0 = wide(hx[direction]).conj()
        r, z, n, g_n = wide_gates[direction].conj().unbind(1)
        w_ih_d, w_hh_d = w_ih_d.conj(), w_hh_d.conj()
        previous = _previous_states(wide_output[:, direction].conj(), h0, order)

        # Factors that do not depend on dh, for all rows: d(pre-activation)/d(h') of n and z, then r through n.
        through_n = (1 - z) * (1 - n * n)
        through_z = (previous - n) * z * (1 - z)
        through_r = g_n * r * (1 - r)

        grad_i = torch.empty(x.size(0), 3 * hidden, dtype=x.dtype, device=x.device)
        grad_g = torch.empty_like(grad_i)
        dh = torch.zeros_like(h0) if grad_h_n is None else wide(grad_h_n[direction]).clone()
        for row, size in reversed(order):
            rows = slice(row, row + size)
            total = dh[:size] if wide_grad is None else dh[:size] + wide_grad[rows, direction]
            d_n = total * through_n[rows]
            d_rz = torch.cat([d_n * through_r[rows], total * through_z[rows]], dim=1)
            grad_i[rows] = torch.cat([d_rz, d_n], dim=1)
            grad_g[rows] = torch.cat([d_rz, d_n * r[rows]], dim=1)
            # Not addmm: for a single row its summation loses three bits more than the product's.
            dh[:size] = total * z[rows] + grad_g[rows] @ w_hh_d

        if need_input_grad:
            grad_x += grad_i @ w_ih_d
        if need_weight_grad:
            products = _product_over_rows(grad_i, x.conj()), _product_over_rows(grad_g, previous)
            sums = (*products, grad_i.sum(0), grad_g.sum(0))
        else:
            sums = (x.new_empty(0),) * 4
        per_direction.append((dh, *sums))

    grad_hx, *grad_weights = (torch.stack(grads).to(input.dtype) for grads in zip(*per_direction, strict=True))
    grad_input = grad_x.view(input.shape).to(input.dtype) if need_input_grad else input.new_empty(0)
    if not need_weight_grad:
        grad_weights = [input.new_empty(0) for _ in grad_weights]
    g_w_ih, g_w_hh, g_b_ih, g_b_hh = grad_weights
    return grad_input, grad_hx, g_w_ih, g_w_hh, g_b_ih, g_b_hh


def _product_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, in pieces: a product of few columns sums all rows in one chain, and so loses digits."""
    piece = max(64, -(-left.size(0) // 16))
    total = left.new_zeros(left.size(1), right.size(1))
    for start in range(0, left.size(0), piece):
        total += left[start : start + piece].t() @ right[start : start + piece]
    return total


def _previous_states(output: Tensor, h0: Tensor, order: list[tuple[int, int]]) -> Tensor:
    """The state before each row [N, H]: the output of the step before where there is one, else h0."""
    previous = torch.empty_like(output)
    last_row, last_size = 0, 0
    for row, size in order:
        known = min(size, last_size)
        previous[row : row + known] = output[last_row : last_row + known]
        previous[row + known : row + size] = h0[known:size]
        last_row, last_size = row, size
    return previous
