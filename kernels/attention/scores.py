"""Computes the scores of a tile, the keys that rows see, and dropout's hash: shared by the attention kernels in Triton.

    s = softcap tanh(scale q . k / softcap) - slope |i + diagonal - j| + bias        -inf where hidden

fastgru/ops/attention/reference.py has the meaning of every option. A tile has BLOCK_M queries and BLOCK_N keys;
columns are padded to BLOCK_D and BLOCK_DV, powers of two. Strides are in elements.
"""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """murmur3's finalizer."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_keep(seed, row, column, drop_below):
    """Whether dropout keeps a position, [BLOCK_M, BLOCK_N]; ``row`` counts the rows of all heads."""
    key = row.to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = mix(mix(column.to(tl.uint32)[None, :] * 0x9E3779B9 + low[:, None]) ^ high[:, None])
    return bits.to(tl.int64) >= drop_below


@triton.jit
def lengths(q_lengths, k_lengths, b, queries, keys, HAS_Q: tl.constexpr, HAS_K: tl.constexpr):
    """Lengths of sequence b, clamped to the tensors."""
    if HAS_Q:
        queries = tl.minimum(tl.maximum(tl.load(q_lengths + b).to(tl.int32), 0), queries)
    if HAS_K:
        keys = tl.minimum(tl.maximum(tl.load(k_lengths + b).to(tl.int32), 0), keys)
    return queries, keys


@triton.jit
def scores(
    x,
    i,
    j,
    bias,
    mask,
    slope,
    q_length,
    k_length,
    diagonal,
    bias_l,
    bias_k,
    mask_l,
    mask_k,
    scale,
    softcap,
    IN_PRODUCTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    ALIBI: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    window_left,
    window_right,
):
    """Scores of a tile from its products x, -inf where hidden, and the softcapped tanh; in units of the products, not
    scaled, where IN_PRODUCTS.

    i, j: [BLOCK_M], [BLOCK_N] positions; bias, mask: pointers to the head's first score; diagonal: the key on the
    diagonal of query 0.
    """
    if not IN_PRODUCTS:
        x = x * scale
    t = x
    if SOFTCAP:
        # tanh by exp: plain language, exact enough in float32 and free of overflow.
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0, -t, t)
        x = softcap * t
    visible = (i[:, None] < q_length) & (j[None, :] < k_length)
    distance = i[:, None] + diagonal - j[None, :]
    if ALIBI:
        x -= slope * tl.abs(distance).to(tl.float32)
    if LEFT:
        visible &= distance <= window_left
    if RIGHT:
        visible &= -distance <= window_right
    if MASK:
        at = mask + i[:, None].to(tl.int64) * mask_l + j[None, :] * mask_k
        visible &= tl.load(at, mask=visible, other=0) != 0
    if BIAS:
        at = bias + i[:, None].to(tl.int64) * bias_l + j[None, :] * bias_k
        added = tl.load(at, mask=visible, other=0.0).to(tl.float32)
        visible &= added != float("-inf")
        x += added
    if not (IN_PRODUCTS or ALIBI or BIAS):
        # Keeps the multiplication by scale from being fused with a later subtraction of the maximum: the maximum would
        # be of rounded scores, the subtraction of unrounded ones.
        x += 0.0
    return tl.where(visible, x, float("-inf")), t


@triton.jit
def finite(x):
    """x with 0 for NaN and infinity."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def propagate_nonfinite(sums, weights, x):
    """``sums``, a sum of weights times finite(x), with NaN where a weight that is not zero met NaN or infinity."""
    nonfinite = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0.0, 1.0)
    if tl.max(nonfinite) > 0:
        met = tl.dot(tl.where(weights != 0, 1.0, 0.0).to(x.dtype), nonfinite.to(x.dtype))
        sums = tl.where(met > 0, float("nan"), sums)
    return sums


@triton.jit
def key_range(
    i0, q_length, k_length, diagonal, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First (a multiple of BLOCK_N) and end of the keys that rows [i0, i0 + BLOCK_M) may see."""
    begin, end = 0, k_length
    if LEFT:
        begin = tl.maximum(0, i0 + diagonal - window_left) // BLOCK_N * BLOCK_N
    if RIGHT:
        last = tl.minimum(i0 + BLOCK_M, q_length) - 1
        end = tl.minimum(k_length, last + diagonal + window_right + 1)
    return begin, tl.where(i0 < q_length, end, 0)
