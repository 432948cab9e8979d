"""The arithmetic of one GRU step, shared by every Triton kernel of the GRU, and the gates of finished products.

With i = x W_ih^T and g = h W_hh^T, split in the gates r, z, n:

    r = sigmoid(i_r + b_ir + g_r + b_hr)            z = sigmoid(i_z + b_iz + g_z + b_hz)
    q = g_n + b_hn                                  n = tanh(i_n + b_in + r * q)
    h' = n + z * (h - n)

and backwards, with d_h the gradient of h':

    d_n = d_h * (1 - z) * (1 - n^2)                 d_z = d_h * (h - n) * z * (1 - z)
    d_q = d_n * r                                   d_r = d_n * q * r * (1 - r)

The gradient of i is (d_r, d_z, d_n), that of g is (d_r, d_z, d_q); d_h * z goes to h directly.

Sizes: T steps, B rows of the batch, D directions, H hidden units, N tokens. The tokens are the active rows of all
steps, one step after the other. Pointers, all contiguous:

    i, g        [N, D, 3H] without bias                 b_ih, b_hh  [D, 3H], or both None
    gates       [D, N, 4, GATE_STRIDE]: r, z, n, q in the problem's dtype; padding holds the equations' values of zeros
    table       int32 [T + 1 + B], when the input is packed: the first token of the steps 0..T, then the number of
                steps of each row, which never grows; None: step t begins at token t * B

Saved for backward: ``gates``.

One launch serves all directions. H, D and the block sizes are compile-time constants, T and B are not. bfloat16 and
float16 are computed in float32; only the operands of products and what is stored are rounded.
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
    """tanh in float32."""
    # Through the exponential of a negative number, which cannot overflow.
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def step_tokens(table_ptr, t, B):
    """The first token of step t, and the number of its tokens."""
    if table_ptr is None:
        return t * B, B
    first = tl.load(table_ptr + t)
    return first, tl.load(table_ptr + t + 1) - first


@triton.jit
def row_steps(table_ptr, T, b):
    """Steps of batch row b, which no later row exceeds."""
    if table_ptr is None:
        return T
    return tl.load(table_ptr + T + 1 + b)


@triton.jit
def load_biases(b_ih_ptr, b_hh_ptr, direction, unit, in_h, H: tl.constexpr):
    """Biases of r, z, n and of q, as float32 vectors; those of r and z are summed."""
    if b_ih_ptr is None:
        zero = tl.zeros([unit.shape[0]], tl.float32)
        return zero, zero, zero, zero
    at = direction * 3 * H + unit
    b_r = tl.load(b_ih_ptr + at, in_h, 0).to(tl.float32) + tl.load(b_hh_ptr + at, in_h, 0).to(tl.float32)
    at += H
    b_z = tl.load(b_ih_ptr + at, in_h, 0).to(tl.float32) + tl.load(b_hh_ptr + at, in_h, 0).to(tl.float32)
    at += H
    b_n = tl.load(b_ih_ptr + at, in_h, 0).to(tl.float32)
    b_q = tl.load(b_hh_ptr + at, in_h, 0).to(tl.float32)
    return b_r, b_z, b_n, b_q


@triton.jit
def gates(i_r, i_z, i_n, g_r, g_z, q):
    """r, z, n from pre-activations to which the biases have been added."""
    r = tl.sigmoid(i_r + g_r)
    z = tl.sigmoid(i_z + g_z)
    n = tanh(i_n + r * q)
    return r, z, n


@triton.jit
def gate_gradients(d_h, r, z, n, q, previous):
    """d_r, d_z, d_n, d_q."""
    d_n = d_h * (1 - z) * (1 - n * n)
    d_z = d_h * (previous - n) * z * (1 - z)
    d_r = d_n * q * r * (1 - r)
    return d_r, d_z, d_n, d_n * r


@triton.jit
def load_gates(ptr, at, mask, GATE_STRIDE: tl.constexpr):
    """r, z, n, q as float32."""
    r = tl.load(ptr + at, mask, 0).to(tl.float32)
    z = tl.load(ptr + at + GATE_STRIDE, mask, 0).to(tl.float32)
    n = tl.load(ptr + at + 2 * GATE_STRIDE, mask, 0).to(tl.float32)
    q = tl.load(ptr + at + 3 * GATE_STRIDE, mask, 0).to(tl.float32)
    return r, z, n, q


@triton.jit
def store_gates(ptr, at, mask, r, z, n, q, GATE_STRIDE: tl.constexpr):
    """Stores r, z, n, q, rounded to the dtype of ``ptr``."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + at, narrow(r, dtype), mask)
    tl.store(ptr + at + GATE_STRIDE, narrow(z, dtype), mask)
    tl.store(ptr + at + 2 * GATE_STRIDE, narrow(n, dtype), mask)
    tl.store(ptr + at + 3 * GATE_STRIDE, narrow(q, dtype), mask)


@triton.jit(do_not_specialize=["N"])
def gru_gates(
    i_ptr,  # [N, D, 3H]: x W_ih^T
    g_ptr,  # [N, D, 3H]: h W_hh^T, h the state before each token
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
    """The gates of all tokens at once. Grid: (ceil(N / BLOCK_N), ceil(GATE_STRIDE / BLOCK_H), D)."""
    direction = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = unit < H
    mask = (token < N)[:, None] & in_h[None, :]
    b_r, b_z, b_n, b_q = load_biases(b_ih_ptr, b_hh_ptr, direction, unit, in_h, H)
    at = (token.to(tl.int64)[:, None] * D + direction) * 3 * H + unit[None, :]
    q = tl.load(g_ptr + at + 2 * H, mask, 0).to(tl.float32) + b_q[None, :]
    r, z, n = gates(
        tl.load(i_ptr + at, mask, 0).to(tl.float32) + b_r[None, :],
        tl.load(i_ptr + at + H, mask, 0).to(tl.float32) + b_z[None, :],
        tl.load(i_ptr + at + 2 * H, mask, 0).to(tl.float32) + b_n[None, :],
        tl.load(g_ptr + at, mask, 0).to(tl.float32),
        tl.load(g_ptr + at + H, mask, 0).to(tl.float32),
        q,
    )
    gates_at = (direction * N + token.to(tl.int64))[:, None] * 4 * GATE_STRIDE + unit[None, :]
    padded = (token < N)[:, None] & (unit < GATE_STRIDE)[None, :]
    store_gates(gates_ptr, gates_at, padded, r, z, n, q, GATE_STRIDE)
