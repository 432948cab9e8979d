"""The backward recurrence of one GRU layer in Triton: resident (one launch) or step by step (one launch per step).

With d_h the gradient of the state that a step computes, and ' for the step after it in the recurrence:

    d_h = grad_output + d_h' * z' + (d_r', d_z', d_q') W_hh
    d_n = d_h * (1 - z) * (1 - n^2)                 d_z = d_h * (h - n) * z * (1 - z)
    d_q = d_n * r                                   d_r = d_n * q * r * (1 - r)

The loop computes only the gradients of h, carried in float32, and of the gates. The products for the gradients of x,
W_ih, W_hh and the biases follow it, over all tokens at once. cell.py has the sizes and the layouts of gates and table.

Pointers, all contiguous:

    grad_output [N, D, H] or None           grad_h_n    [D, B, H] or None           w_hh    [D, 3H, H]
    previous    [N, D, H]: the state before each token, see gru_previous_states
    gates       [D, N, 4, GATE_STRIDE] as the forward pass saved them                table   of a packed input, or None
    grad_gates  [N, 4 * D * H]: d_r, d_z, d_n of each direction, which is the gradient of i, then d_q of each
    hx, grad_hx [D, B, H]

Saved by the forward pass: ``gates``; ``previous`` is made of its output.
"""

import triton
import triton.language as tl
from fastgru.kernels.gru.cell import dot, gate_gradients, load_gates, narrow, row_steps, step_tokens


@triton.jit(do_not_specialize=["B"])
def gru_previous_states(
    output_ptr,  # [N, D, H]
    hx_ptr,
    table_ptr,
    previous_ptr,
    B,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The state before each token: the output of the step before where there is one, else hx.

    Grid: (T, ceil(B / BLOCK_B), D).
    """
    t = tl.program_id(0)
    direction = tl.program_id(2)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_token, size = step_tokens(table_ptr, t, B)
    before = tl.where(direction == 0, t - 1, t + 1)
    has_before = (before >= 0) & (before < T)
    last_token, last_size = step_tokens(table_ptr, tl.where(has_before, before, t), B)
    known = (b < last_size) & has_before
    output_at = ((last_token + b).to(tl.int64) * D + direction) * H
    hx_at = (direction * B + b).to(tl.int64) * H
    source = tl.where(known, output_ptr + output_at, hx_ptr + hx_at)
    target = previous_ptr + ((first_token + b).to(tl.int64) * D + direction) * H
    for u0 in range(0, H, BLOCK_H):
        unit = u0 + tl.arange(0, BLOCK_H)
        mask = (b < size)[:, None] & (unit < H)[None, :]
        tl.store(target[:, None] + unit[None, :], tl.load(source[:, None] + unit[None, :], mask), mask)


@triton.jit
def _load_step(
    grad_output_ptr, previous_ptr, gates_ptr, token, mask, unit, direction, N,
    H: tl.constexpr, D: tl.constexpr, GATE_STRIDE: tl.constexpr,
):  # fmt: skip
    """grad_output, the state before, r, z, n, q of tokens, in float32."""
    at = (token[:, None] * D + direction) * H + unit[None, :]
    grad = tl.zeros(mask.shape, tl.float32)
    if grad_output_ptr is not None:
        grad = tl.load(grad_output_ptr + at, mask, 0).to(tl.float32)
    previous = tl.load(previous_ptr + at, mask, 0).to(tl.float32)
    gates_at = (direction * N + token)[:, None] * 4 * GATE_STRIDE + unit[None, :]
    r, z, n, q = load_gates(gates_ptr, gates_at, mask, GATE_STRIDE)
    return grad, previous, r, z, n, q


@triton.jit
def _store_grad_gates(ptr, token, mask, unit, direction, d_r, d_z, d_n, d_q, H: tl.constexpr, D: tl.constexpr):
    """Stores the gradients of the gates of tokens."""
    at = token[:, None] * 4 * D * H + unit[None, :]
    i_at = at + direction * 3 * H
    tl.store(ptr + i_at, d_r, mask)
    tl.store(ptr + i_at + H, d_z, mask)
    tl.store(ptr + i_at + 2 * H, d_n, mask)
    tl.store(ptr + at + (3 * D + direction) * H, d_q, mask)


@triton.jit(do_not_specialize=["T", "B", "N"])
def gru_backward_resident(
    grad_output_ptr,
    grad_h_n_ptr,
    w_hh_ptr,
    previous_ptr,
    gates_ptr,
    table_ptr,
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

    steps = row_steps(table_ptr, T, b0)
    for step in range(steps):
        first_token, size = step_tokens(table_ptr, tl.where(direction == 0, steps - 1 - step, step), B)
        active = b < size
        mask = active[:, None] & in_h[None, :]
        token = (first_token + b).to(tl.int64)
        grad, previous, r, z, n, q = _load_step(
            grad_output_ptr, previous_ptr, gates_ptr, token, mask, unit, direction, N, H, D, GATE_STRIDE
        )
        d_h = carry + grad
        d_r, d_z, d_n, d_q = gate_gradients(d_h, r, z, n, q, previous)
        d_r, d_z, d_n, d_q = narrow(d_r, dtype), narrow(d_z, dtype), narrow(d_n, dtype), narrow(d_q, dtype)
        _store_grad_gates(grad_gates_ptr, token, mask, unit, direction, d_r, d_z, d_n, d_q, H, D)
        through = dot(d_r, w_r, d_h * z, PRECISION)
        through = dot(d_z, w_z, through, PRECISION)
        through = dot(d_q, w_n, through, PRECISION)
        carry = tl.where(active[:, None], through, carry)
    tl.store(grad_hx_ptr + state_at, narrow(carry, dtype), state_mask)


@triton.jit(
    do_not_specialize=[
        "B",
        "N",
        "token_0",
        "size_0",
        "last_token_0",
        "last_size_0",
        "token_1",
        "size_1",
        "last_token_1",
        "last_size_1",
    ]
)
def gru_backward_step(
    grad_output_ptr,
    w_hh_ptr,
    previous_ptr,
    gates_ptr,
    grad_gates_ptr,
    carry_ptr,  # [D, B, H] float32, grad_h_n at first: d_h * z of active rows, the gradient of h of all others
    B,
    N,
    token_0,  # of direction 0: the step's first token, its number of tokens, and both of the launch before, or 0
    size_0,
    last_token_0,
    last_size_0,
    token_1,  # the same of direction 1
    size_1,
    last_token_1,
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
    first_token = tl.where(direction == 0, token_0, token_1)
    size = tl.where(direction == 0, size_0, size_1)
    last_token = tl.where(direction == 0, last_token_0, last_token_1)
    last_size = tl.where(direction == 0, last_size_0, last_size_1)
    b0 = tl.program_id(0) * BLOCK_B
    if b0 < tl.maximum(size, last_size):
        b = b0 + tl.arange(0, BLOCK_B)
        unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_h = unit < H
        active = b < size
        mask = active[:, None] & in_h[None, :]
        token = (first_token + b).to(tl.int64)
        grad, previous, r, z, n, q = _load_step(
            grad_output_ptr, previous_ptr, gates_ptr, token, mask, unit, direction, N, H, D, GATE_STRIDE
        )

        last_at = (last_token + b).to(tl.int64) * 4 * D * H
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
            d_q = tl.load(g_from[:, None] + k[None, :], d_mask, 0)
            through = dot(d_r, tl.load(w_at, w_mask, 0), through, PRECISION)
            through = dot(d_z, tl.load(w_at + H * H, w_mask, 0), through, PRECISION)
            through = dot(d_q, tl.load(w_at + 2 * H * H, w_mask, 0), through, PRECISION)

        state_mask = (b < B)[:, None] & in_h[None, :]
        state_at = carry_ptr + (direction * B + b).to(tl.int64)[:, None] * H + unit[None, :]
        carry = tl.load(state_at, state_mask, 0) + through
        d_h = carry + grad
        d_r, d_z, d_n, d_q = gate_gradients(d_h, r, z, n, q, previous)
        d_r, d_z, d_n, d_q = narrow(d_r, dtype), narrow(d_z, dtype), narrow(d_n, dtype), narrow(d_q, dtype)
        _store_grad_gates(grad_gates_ptr, token, mask, unit, direction, d_r, d_z, d_n, d_q, H, D)
        tl.store(state_at, tl.where(active[:, None], d_h * z, carry), state_mask)
