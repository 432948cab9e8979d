"""The arithmetic of one GRU step, shared by every kernel, and the gates recomputed from two finished products.

With i = x W_ih^T and g = h W_hh^T, split in the gates r, z, n:

    r = sigmoid(i_r + b_ir + g_r + b_hr)            z = sigmoid(i_z + b_iz + g_z + b_hz)
    n = tanh(i_n + b_in + r * (g_n + b_hn))         h' = n + z * (h - n)

and backwards, with t the gradient of h':

    d_n = t * (1 - z) * (1 - n^2)                   d_z = t * (h - n) * z * (1 - z)
    d_r = d_n * (g_n + b_hn) * r * (1 - r)          d_g = d_n * r

The gradient of i is (d_r, d_z, d_n), that of g is (d_r, d_z, d_g), and t * z goes to h directly.

Saved for backward, per row: r, z, n, g_n + b_hn, each padded to GATE_STRIDE columns, in the problem's dtype. Padding
holds what the equations give for zeros.

All kernels: D directions in one launch. H, D and the block sizes are compile-time constants, T and B are not. The rows
of all steps lie one after the other, N in all; when the input is packed, ``rows_ptr`` says where (int32: the first row
of the steps 0..T, then the number of steps of each batch row), else step t begins at row t * B. bfloat16 and float16
are computed in float32; only the operands of products and what is stored are rounded.
"""

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16, and truncates where the hardware rounds: see dot and narrow.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION is that of float32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    # Through the exponential of a negative number, which cannot overflow.
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def step_rows(rows_ptr, t, B):
    """First row and number of rows of step t."""
    if rows_ptr is None:
        return t * B, B
    first = tl.load(rows_ptr + t)
    return first, tl.load(rows_ptr + t + 1) - first


@triton.jit
def row_steps(rows_ptr, T, b):
    """Steps of batch row b, which no later row exceeds."""
    if rows_ptr is None:
        return T
    return tl.load(rows_ptr + T + 1 + b)


@triton.jit
def load_biases(b_ih_ptr, b_hh_ptr, direction, unit, in_h, H: tl.constexpr):
    """Biases of r, z, n and of g_n, as float32 vectors; those of r and z are summed."""
    if b_ih_ptr is None:
        zero = tl.zeros([unit.shape[0]], tl.float32)
        return zero, zero, zero, zero
    at = direction * 3 * H + unit
    b_r = tl.load(b_ih_ptr + at, in_h, 0).to(tl.float32) + tl.load(b_hh_ptr + at, in_h, 0).to(tl.float32)
    at += H
    b_z = tl.load(b_ih_ptr + at, in_h, 0).to(tl.float32) + tl.load(b_hh_ptr + at, in_h, 0).to(tl.float32)
    at += H
    b_n = tl.load(b_ih_ptr + at, in_h, 0).to(tl.float32)
    b_g = tl.load(b_hh_ptr + at, in_h, 0).to(tl.float32)
    return b_r, b_z, b_n, b_g


@triton.jit
def gates(i_r, i_z, i_n, g_r, g_z, g_n):
    """r, z, n from pre-activations to which the biases have been added."""
    r = tl.sigmoid(i_r + g_r)
    z = tl.sigmoid(i_z + g_z)
    n = tanh(i_n + r * g_n)
    return r, z, n


@triton.jit
def gate_gradients(total, r, z, n, g_n, previous):
    """d_r, d_z, d_n, d_g."""
    d_n = total * (1 - z) * (1 - n * n)
    d_z = total * (previous - n) * z * (1 - z)
    d_r = d_n * g_n * r * (1 - r)
    return d_r, d_z, d_n, d_n * r


@triton.jit
def load_gates(ptr, at, mask, GATE_STRIDE: tl.constexpr):
    """r, z, n, g_n + b_hn as float32."""
    r = tl.load(ptr + at, mask, 0).to(tl.float32)
    z = tl.load(ptr + at + GATE_STRIDE, mask, 0).to(tl.float32)
    n = tl.load(ptr + at + 2 * GATE_STRIDE, mask, 0).to(tl.float32)
    g_n = tl.load(ptr + at + 3 * GATE_STRIDE, mask, 0).to(tl.float32)
    return r, z, n, g_n


@triton.jit
def store_gates(ptr, at, mask, r, z, n, g_n, GATE_STRIDE: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + at, narrow(r, dtype), mask)
    tl.store(ptr + at + GATE_STRIDE, narrow(z, dtype), mask)
    tl.store(ptr + at + 2 * GATE_STRIDE, narrow(n, dtype), mask)
    tl.store(ptr + at + 3 * GATE_STRIDE, narrow(g_n, dtype), mask)


@triton.jit(do_not_specialize=["N"])
def gru_gates(
    i_ptr,  # [N, D, 3H]: x W_ih^T
    g_ptr,  # [N, D, 3H]: h W_hh^T, h the state before each row
    b_ih_ptr,  # [D, 3H] or None
    b_hh_ptr,  # [D, 3H] or None
    gates_ptr,  # [D, N, 4, GATE_STRIDE], padding included
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The gates of all rows at once. Grid: (ceil(N / BLOCK_N), ceil(GATE_STRIDE / BLOCK_H), D)."""
    direction = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = unit < H
    mask = (row < N)[:, None] & in_h[None, :]
    b_r, b_z, b_n, b_g = load_biases(b_ih_ptr, b_hh_ptr, direction, unit, in_h, H)
    at = (row.to(tl.int64)[:, None] * D + direction) * 3 * H + unit[None, :]
    g_n = tl.load(g_ptr + at + 2 * H, mask, 0).to(tl.float32) + b_g[None, :]
    r, z, n = gates(
        tl.load(i_ptr + at, mask, 0).to(tl.float32) + b_r[None, :],
        tl.load(i_ptr + at + H, mask, 0).to(tl.float32) + b_z[None, :],
        tl.load(i_ptr + at + 2 * H, mask, 0).to(tl.float32) + b_n[None, :],
        tl.load(g_ptr + at, mask, 0).to(tl.float32),
        tl.load(g_ptr + at + H, mask, 0).to(tl.float32),
        g_n,
    )
    gates_at = (direction * N + row.to(tl.int64))[:, None] * 4 * GATE_STRIDE + unit[None, :]
    padded = (row < N)[:, None] & (unit < GATE_STRIDE)[None, :]
    store_gates(gates_ptr, gates_at, padded, r, z, n, g_n, GATE_STRIDE)
