"""Backward recurrence of one GRU layer. cell.py has the equations and the conventions.

The loop computes only the gradient of h, carried in float32, and the gradients of the gates; the products that give the
gradients of x, W_ih, W_hh and the biases follow it, over all rows at once. With ' for the step that comes after in the
recurrence, and t for the gradient of the state that a step computes:

    t = grad_output + t' * z' + (d_r', d_z', d_g') W_hh

Shapes, all contiguous: grad_output [N, D, H] or None; grad_h_n [D, B, H] or None; w_hh [D, 3H, H]; previous [N, D, H],
the state before each row; gates [D, N, 4, GATE_STRIDE] as forward saved them; grad_gates [N, 4 * D * H]: first d_r,
d_z, d_n of each direction, which is the gradient of i, then d_g of each; hx, grad_hx [D, B, H]; rows as in cell.py,
or None.
"""

import triton
import triton.language as tl
from fastgru.kernels.gru.cell import dot, gate_gradients, load_gates, narrow, row_steps, step_rows


@triton.jit(do_not_specialize=["B"])
def gru_previous_states(
    output_ptr,  # [N, D, H]
    hx_ptr,
    rows_ptr,
    previous_ptr,
    B,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The state before each row: the output of the step before where there is one, else hx.

    Grid: (T, ceil(B / BLOCK_B), D).
    """
    t = tl.program_id(0)
    direction = tl.program_id(2)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    row, size = step_rows(rows_ptr, t, B)
    before = tl.where(direction == 0, t - 1, t + 1)
    has_before = (before >= 0) & (before < T)
    last_row, last_size = step_rows(rows_ptr, tl.where(has_before, before, t), B)
    known = (b < last_size) & has_before
    output_at = ((last_row + b).to(tl.int64) * D + direction) * H
    hx_at = (direction * B + b).to(tl.int64) * H
    source = tl.where(known, output_ptr + output_at, hx_ptr + hx_at)
    target = previous_ptr + ((row + b).to(tl.int64) * D + direction) * H
    for u0 in range(0, H, BLOCK_H):
        unit = u0 + tl.arange(0, BLOCK_H)
        mask = (b < size)[:, None] & (unit < H)[None, :]
        tl.store(target[:, None] + unit[None, :], tl.load(source[:, None] + unit[None, :], mask), mask)


@triton.jit
def _load_step(
    grad_output_ptr, previous_ptr, gates_ptr, at_row, mask, unit, direction, N,
    H: tl.constexpr, D: tl.constexpr, GATE_STRIDE: tl.constexpr,
):  # fmt: skip
    """grad_output, the state before, r, z, n, g_n of rows, in float32."""
    at = (at_row[:, None] * D + direction) * H + unit[None, :]
    grad = tl.zeros(mask.shape, tl.float32)
    if grad_output_ptr is not None:
        grad = tl.load(grad_output_ptr + at, mask, 0).to(tl.float32)
    previous = tl.load(previous_ptr + at, mask, 0).to(tl.float32)
    gates_at = (direction * N + at_row)[:, None] * 4 * GATE_STRIDE + unit[None, :]
    r, z, n, g_n = load_gates(gates_ptr, gates_at, mask, GATE_STRIDE)
    return grad, previous, r, z, n, g_n


@triton.jit
def _store_grad_gates(ptr, at_row, mask, unit, direction, d_r, d_z, d_n, d_g, H: tl.constexpr, D: tl.constexpr):
    at = at_row[:, None] * 4 * D * H + unit[None, :]
    i_at = at + direction * 3 * H
    tl.store(ptr + i_at, d_r, mask)
    tl.store(ptr + i_at + H, d_z, mask)
    tl.store(ptr + i_at + 2 * H, d_n, mask)
    tl.store(ptr + at + (3 * D + direction) * H, d_g, mask)


@triton.jit(do_not_specialize=["T", "B", "N"])
def gru_backward_resident(
    grad_output_ptr,
    grad_h_n_ptr,
    w_hh_ptr,
    previous_ptr,
    gates_ptr,
    rows_ptr,
    grad_gates_ptr,
    grad_hx_ptr,
    T,
    B,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The whole sequence for a tile of BLOCK_B batch rows; W_hh is loaded once. BLOCK_H >= H.

    Grid: (ceil(B / BLOCK_B), D).
    """
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty
    direction = tl.program_id(1)
    b0 = tl.program_id(0) * BLOCK_B
    b = b0 + tl.arange(0, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    in_h = unit < H
    w_mask = (k < H)[:, None] & in_h[None, :]
    w_at = (direction * 3 * H + k[:, None]) * H + unit[None, :]
    w_r = tl.load(w_hh_ptr + w_at, w_mask, 0)
    w_z = tl.load(w_hh_ptr + w_at + H * H, w_mask, 0)
    w_n = tl.load(w_hh_ptr + w_at + 2 * H * H, w_mask, 0)

    state_mask = (b < B)[:, None] & in_h[None, :]
    state_at = (direction * B + b).to(tl.int64)[:, None] * H + unit[None, :]
    carry = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if grad_h_n_ptr is not None:
        carry = tl.load(grad_h_n_ptr + state_at, state_mask, 0).to(tl.float32)

    steps = row_steps(rows_ptr, T, b0)
    for step in range(steps):
        row, size = step_rows(rows_ptr, tl.where(direction == 0, steps - 1 - step, step), B)
        active = b < size
        mask = active[:, None] & in_h[None, :]
        at_row = (row + b).to(tl.int64)
        grad, previous, r, z, n, g_n = _load_step(
            grad_output_ptr, previous_ptr, gates_ptr, at_row, mask, unit, direction, N, H, D, GATE_STRIDE
        )
        total = carry + grad
        d_r, d_z, d_n, d_g = gate_gradients(total, r, z, n, g_n, previous)
        d_r, d_z, d_n, d_g = narrow(d_r, dtype), narrow(d_z, dtype), narrow(d_n, dtype), narrow(d_g, dtype)
        _store_grad_gates(grad_gates_ptr, at_row, mask, unit, direction, d_r, d_z, d_n, d_g, H, D)
        through = dot(d_r, w_r, total * z, PRECISION)
        through = dot(d_z, w_z, through, PRECISION)
        through = dot(d_g, w_n, through, PRECISION)
        carry = tl.where(active[:, None], through, carry)
    tl.store(grad_hx_ptr + state_at, narrow(carry, dtype), state_mask)


@triton.jit(
    do_not_specialize=[
        "B",
        "N",
        "row_0",
        "size_0",
        "last_row_0",
        "last_size_0",
        "row_1",
        "size_1",
        "last_row_1",
        "last_size_1",
    ]
)
def gru_backward_step(
    grad_output_ptr,
    w_hh_ptr,
    previous_ptr,
    gates_ptr,
    grad_gates_ptr,
    carry_ptr,  # [D, B, H] float32, grad_h_n at first: t * z of rows in progress, the gradient of h of all others
    B,
    N,
    row_0,  # of direction 0: the step's first row, its number of rows, and both of the launch before, or 0
    size_0,
    last_row_0,
    last_size_0,
    row_1,  # the same of direction 1
    size_1,
    last_row_1,
    last_size_1,
    H: tl.constexpr,
    D: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step: BLOCK_H units for BLOCK_B batch rows. Grid: (ceil(B/BLOCK_B), ceil(H/BLOCK_H), D).

    The product that ends a step needs all its gate gradients, so the launch after it begins with that product; one more
    launch, with no rows of its own, ends the last step.
    """
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty
    direction = tl.program_id(2)
    row = tl.where(direction == 0, row_0, row_1)
    size = tl.where(direction == 0, size_0, size_1)
    last_row = tl.where(direction == 0, last_row_0, last_row_1)
    last_size = tl.where(direction == 0, last_size_0, last_size_1)
    b0 = tl.program_id(0) * BLOCK_B
    if b0 < tl.maximum(size, last_size):
        b = b0 + tl.arange(0, BLOCK_B)
        unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_h = unit < H
        active = b < size
        mask = active[:, None] & in_h[None, :]
        at_row = (row + b).to(tl.int64)
        grad, previous, r, z, n, g_n = _load_step(
            grad_output_ptr, previous_ptr, gates_ptr, at_row, mask, unit, direction, N, H, D, GATE_STRIDE
        )

        last_at = (last_row + b).to(tl.int64) * 4 * D * H
        i_from = grad_gates_ptr + last_at + direction * 3 * H
        g_from = grad_gates_ptr + last_at + (3 * D + direction) * H
        through = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            d_mask = (b < last_size)[:, None] & (k < H)[None, :]
            w_mask = (k < H)[:, None] & in_h[None, :]
            w_at = w_hh_ptr + (direction * 3 * H + k[:, None]) * H + unit[None, :]
            d_r = tl.load(i_from[:, None] + k[None, :], d_mask, 0)
            d_z = tl.load(i_from[:, None] + H + k[None, :], d_mask, 0)
            d_g = tl.load(g_from[:, None] + k[None, :], d_mask, 0)
            through = dot(d_r, tl.load(w_at, w_mask, 0), through, PRECISION)
            through = dot(d_z, tl.load(w_at + H * H, w_mask, 0), through, PRECISION)
            through = dot(d_g, tl.load(w_at + 2 * H * H, w_mask, 0), through, PRECISION)

        state_mask = (b < B)[:, None] & in_h[None, :]
        state_at = carry_ptr + (direction * B + b).to(tl.int64)[:, None] * H + unit[None, :]
        dh = tl.load(state_at, state_mask, 0) + through
        total = dh + grad
        d_r, d_z, d_n, d_g = gate_gradients(total, r, z, n, g_n, previous)
        d_r, d_z, d_n, d_g = narrow(d_r, dtype), narrow(d_z, dtype), narrow(d_n, dtype), narrow(d_g, dtype)
        _store_grad_gates(grad_gates_ptr, at_row, mask, unit, direction, d_r, d_z, d_n, d_g, H, D)
        tl.store(state_at, tl.where(active[:, None], total * z, dh), state_mask)
