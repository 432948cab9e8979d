"""The forward recurrence of one GRU layer in Triton: resident (one launch) or step by step (one launch per step).

    g = h W_hh^T                                    r = sigmoid(i_r + b_ir + g_r + b_hr)
    z = sigmoid(i_z + b_iz + g_z + b_hz)            q = g_n + b_hn
    n = tanh(i_n + b_in + r * q)                    h' = n + z * (h - n)

The input projection i = x W_ih^T is computed before. h is carried in float32; rounded to the problem's dtype it is the
output and the operand of the next product. cell.py has the sizes, the arithmetic and the layouts of gates and table.

Pointers, all contiguous:

    i       [N, D, 3H] without bias         w_hh    [D, 3H, H]              b_ih, b_hh  [D, 3H], or both None
    hx      [D, B, H]                       table   of a packed input, or None
    output  [N, D, H]                       h_n     [D, B, H]
    gates   [D, N, 4, GATE_STRIDE], or None where no gradient is wanted

Saved for backward: r, z, n, q in ``gates``.
"""

import triton
import triton.language as tl
from fastgru.kernels.gru.cell import dot, gates, load_biases, narrow, row_steps, step_tokens, store_gates


@triton.jit
def _load_projection(i_ptr, first_token, b, active, in_h, unit, direction, H: tl.constexpr, D: tl.constexpr):
    """i_r, i_z, i_n of the rows b of a step, 0 where inactive."""
    mask = active[:, None] & in_h[None, :]
    at = ((first_token + b).to(tl.int64)[:, None] * D + direction) * 3 * H + unit[None, :]
    return tl.load(i_ptr + at, mask, 0), tl.load(i_ptr + at + H, mask, 0), tl.load(i_ptr + at + 2 * H, mask, 0)


@triton.jit(do_not_specialize=["T", "B", "N"])
def gru_forward_resident(
    i_ptr,
    w_hh_ptr,
    b_ih_ptr,
    b_hh_ptr,
    hx_ptr,
    table_ptr,
    output_ptr,
    h_n_ptr,
    gates_ptr,
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
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    direction = tl.program_id(1)
    b0 = tl.program_id(0) * BLOCK_B
    b = b0 + tl.arange(0, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    in_h = unit < H
    w_mask = (k < H)[:, None] & in_h[None, :]
    w_at = (direction * 3 * H + unit[None, :]) * H + k[:, None]
    w_r = tl.load(w_hh_ptr + w_at, w_mask, 0)
    w_z = tl.load(w_hh_ptr + w_at + H * H, w_mask, 0)
    w_n = tl.load(w_hh_ptr + w_at + 2 * H * H, w_mask, 0)
    b_r, b_z, b_n, b_q = load_biases(b_ih_ptr, b_hh_ptr, direction, unit, in_h, H)

    state_mask = (b < B)[:, None] & in_h[None, :]
    state_at = (direction * B + b).to(tl.int64)[:, None] * H + unit[None, :]
    h = tl.load(hx_ptr + state_at, state_mask, 0).to(tl.float32)
    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)

    steps = row_steps(table_ptr, T, b0)
    first_token, size = step_tokens(table_ptr, tl.where(direction == 0, 0, steps - 1), B)
    i_r, i_z, i_n = _load_projection(i_ptr, first_token, b, b < size, in_h, unit, direction, H, D)
    for step in range(steps):
        active = b < size
        token = (first_token + b).to(tl.int64)
        # Prefetches the next step's projection; past the end the last one is loaded again.
        ahead = tl.minimum(step + 1, steps - 1)
        first_token, size = step_tokens(table_ptr, tl.where(direction == 0, ahead, steps - 1 - ahead), B)
        next_r, next_z, next_n = _load_projection(i_ptr, first_token, b, b < size, in_h, unit, direction, H, D)

        operand = narrow(h, dtype)
        g_r = dot(operand, w_r, zero, PRECISION)
        g_z = dot(operand, w_z, zero, PRECISION)
        q = dot(operand, w_n, zero, PRECISION) + b_q[None, :]
        r, z, n = gates(
            i_r.to(tl.float32) + b_r[None, :],
            i_z.to(tl.float32) + b_z[None, :],
            i_n.to(tl.float32) + b_n[None, :],
            g_r,
            g_z,
            q,
        )
        h = tl.where(active[:, None], n + z * (h - n), h)
        output_at = (token[:, None] * D + direction) * H + unit[None, :]
        tl.store(output_ptr + output_at, narrow(h, dtype), active[:, None] & in_h[None, :])
        if gates_ptr is not None:
            gates_at = (direction * N + token)[:, None] * 4 * GATE_STRIDE + unit[None, :]
            padded = active[:, None] & (unit < GATE_STRIDE)[None, :]
            store_gates(gates_ptr, gates_at, padded, r, z, n, q, GATE_STRIDE)
        i_r, i_z, i_n = next_r, next_z, next_n
    tl.store(h_n_ptr + state_at, narrow(h, dtype), state_mask)


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
def gru_forward_step(
    i_ptr,
    w_hh_ptr,
    b_ih_ptr,
    b_hh_ptr,
    hx_ptr,
    state_ptr,  # [D, B, H] float32: h, read and written
    output_ptr,
    gates_ptr,
    B,
    N,
    token_0,  # of direction 0: the step's first token, its number of tokens, and both of the step before, or 0
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
    """One step: BLOCK_H units of the three gates for BLOCK_B batch rows. Grid: (ceil(B/BLOCK_B), ceil(H/BLOCK_H), D).

    A row that was not active in the step before starts from hx.
    """
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    direction = tl.program_id(2)
    first_token = tl.where(direction == 0, token_0, token_1)
    size = tl.where(direction == 0, size_0, size_1)
    last_token = tl.where(direction == 0, last_token_0, last_token_1)
    last_size = tl.where(direction == 0, last_size_0, last_size_1)
    b0 = tl.program_id(0) * BLOCK_B
    if b0 < size:
        b = b0 + tl.arange(0, BLOCK_B)
        unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_h = unit < H
        active = b < size

        i_r, i_z, i_n = _load_projection(i_ptr, first_token, b, active, in_h, unit, direction, H, D)
        last_at = ((last_token + b).to(tl.int64) * D + direction) * H
        hx_at = (direction * B + b).to(tl.int64) * H
        h_from = tl.where(b < last_size, output_ptr + last_at, hx_ptr + hx_at)
        w_row = (direction * 3 * H + unit) * H
        g_r = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        g_z = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        q = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            h = tl.load(h_from[:, None] + k[None, :], active[:, None] & (k < H)[None, :], 0)
            w_mask = (k < H)[:, None] & in_h[None, :]
            w_at = w_hh_ptr + w_row[None, :] + k[:, None]
            g_r = dot(h, tl.load(w_at, w_mask, 0), g_r, PRECISION)
            g_z = dot(h, tl.load(w_at + H * H, w_mask, 0), g_z, PRECISION)
            q = dot(h, tl.load(w_at + 2 * H * H, w_mask, 0), q, PRECISION)

        b_r, b_z, b_n, b_q = load_biases(b_ih_ptr, b_hh_ptr, direction, unit, in_h, H)
        q += b_q[None, :]
        r, z, n = gates(
            i_r.to(tl.float32) + b_r[None, :],
            i_z.to(tl.float32) + b_z[None, :],
            i_n.to(tl.float32) + b_n[None, :],
            g_r,
            g_z,
            q,
        )
        mask = active[:, None] & in_h[None, :]
        state_at = hx_at[:, None] + unit[None, :]
        new = n + z * (tl.load(state_ptr + state_at, mask, 0) - n)
        tl.store(state_ptr + state_at, new, mask)
        token = (first_token + b).to(tl.int64)[:, None]
        tl.store(output_ptr + (token * D + direction) * H + unit[None, :], narrow(new, dtype), mask)
        if gates_ptr is not None:
            gates_at = (direction * N + token) * 4 * GATE_STRIDE + unit[None, :]
            padded = active[:, None] & (unit < GATE_STRIDE)[None, :]
            store_gates(gates_ptr, gates_at, padded, r, z, n, q, GATE_STRIDE)
