"""The backward pass of attention in Triton, without atomics: by query tile for dq (and dbias), by key tile for dk, dv.

    p = 2^(c(s - m_i)) / l_i    dp = drop(do_i . v_j)    ds = p (dp - delta_i)    dx = ds (1 - tanh^2), with softcap
    dq_i = scale sum_j dx k_j    dk_j = scale sum_i dx q_i    dv_j = sum_i drop(p) do_i    dbias_ij = ds

with s of scores.py, and c, m and l of forward.py. Where l = 1 a row sees one key, or the other weights vanish beside 1
in float32. Then ds = p dlse_i, mostly exactly 0: dp of such a row, and delta but for dlse, are set to 0, because their
difference would be a rounding error.

Pointers as in forward.py, and:

    d_out like out; dq, dk, dv like q, k, v; delta [B, Hq, Lq] float32 contiguous: do_i . o_i, 0 if l_i = 1, less dlse_i
    d_bias [B, Hq, Lq, Lk] float32 contiguous: ds of every score; the caller sums over broadcast dimensions

Saved by the forward pass: out, of which delta is made, and statistics.
"""

import triton
import triton.language as tl
from fastgru.kernels.attention.scores import dropout_keep, finite, key_range, lengths, propagate_nonfinite, scores


@triton.jit
def score_gradients(
    q_tile, k_tile, v_tile, do_tile, i, j, top, total, row_delta, bias, mask, slope, seed, row,
    q_length, k_length, diagonal, bias_l, bias_k, mask_l, mask_k, scale, factor, softcap, window_left, window_right,
    drop_below, keep_scale,
    IN_PRODUCTS: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """drop(p), ds and dx of a tile, [BLOCK_M, BLOCK_N]."""
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    s, t = scores(
        x, i, j, bias, mask, slope, q_length, k_length, diagonal, bias_l, bias_k, mask_l, mask_k, scale, softcap,
        IN_PRODUCTS, SOFTCAP, BIAS, MASK, ALIBI, LEFT, RIGHT, window_left, window_right,
    )  # fmt: skip
    # No score is above the maximum, but the last bits of large ones may differ: the forward pass may have used another
    # matrix instruction.
    below = tl.minimum(s - top[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    p = tl.exp2(below * factor) * inverse[:, None]
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
    dp = tl.where((total == 1.0)[:, None], 0.0, dp)
    dropped = p
    if DROPOUT:
        keep = dropout_keep(tl.load(seed), row, j, drop_below)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = tl.where(p == 0.0, 0.0, p * (dp - row_delta[:, None]))
    dx = ds
    if SOFTCAP:
        dx = tl.where(p == 0.0, 0.0, ds * (1.0 - t * t))
    return dropped, ds, dx


@triton.jit
def attention_backward_queries(
    q, k, v, d_out, statistics, delta, dq, d_bias, bias, mask, slopes, q_lengths, k_lengths, seed,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, dq_b, dq_h, dq_l,
    bias_b, bias_h, bias_l, bias_k, mask_b, mask_h, mask_l, mask_k, slope_b,
    heads, group, queries, keys, columns, value_columns,
    scale, factor, softcap, window_left, window_right, drop_below, keep_scale,
    BOTTOM_RIGHT: tl.constexpr, IN_PRODUCTS: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    i0, head = tl.program_id(0) % tiles * BLOCK_M, tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    b64, h64, kh64 = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
    q_length, k_length = lengths(q_lengths, k_lengths, b, queries, keys, HAS_Q, HAS_K)
    diagonal = k_length - q_length if BOTTOM_RIGHT else 0

    i, d, dv = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row = (b64 * heads + h) * queries + i
    seen = i[:, None] < q_length
    at = q + b64 * q_b + h64 * q_h + i[:, None].to(tl.int64) * q_l + d[None, :]
    q_tile = tl.load(at, mask=seen & (d[None, :] < columns), other=0.0)
    at = d_out + b64 * do_b + h64 * do_h + i[:, None].to(tl.int64) * do_l + dv[None, :]
    do_tile = tl.load(at, mask=seen & (dv[None, :] < value_columns), other=0.0)
    all_rows = (tl.num_programs(0) // tiles).to(tl.int64) * queries
    top = tl.load(statistics + row, mask=i < q_length, other=0.0)
    total = tl.load(statistics + all_rows + row, mask=i < q_length, other=0.0)
    row_delta = tl.load(delta + row, mask=i < q_length, other=0.0)
    bias += b64 * bias_b + h64 * bias_h
    mask += b64 * mask_b + h64 * mask_h
    k += b64 * k_b + kh64 * k_h
    v += b64 * v_b + kh64 * v_h
    slope = tl.load(slopes + b64 * slope_b + h) if ALIBI else 0.0

    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, end = key_range(i0, q_length, k_length, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        exists = j[:, None] < k_length
        k_tile = tl.load(
            k + j[:, None].to(tl.int64) * k_l + d[None, :], mask=exists & (d[None, :] < columns), other=0.0
        )
        v_at = v + j[:, None].to(tl.int64) * v_l + dv[None, :]
        v_tile = tl.load(v_at, mask=exists & (dv[None, :] < value_columns), other=0.0)
        _, ds, dx = score_gradients(
            q_tile, k_tile, v_tile, do_tile, i, j, top, total, row_delta, bias, mask, slope, seed, row,
            q_length, k_length, diagonal, bias_l, bias_k, mask_l, mask_k, scale, factor, softcap, window_left,
            window_right, drop_below, keep_scale,
            IN_PRODUCTS, SOFTCAP, BIAS, MASK, ALIBI, LEFT, RIGHT, DROPOUT, PRECISION,
        )  # fmt: skip
        if BIAS_GRAD:
            tl.store(d_bias + row[:, None] * keys + j[None, :], ds, mask=seen & (j[None, :] < k_length))
        sums += tl.dot(dx.to(k_tile.dtype), finite(k_tile), input_precision=PRECISION)
    at = dq + b64 * dq_b + h64 * dq_h + i[:, None].to(tl.int64) * dq_l + d[None, :]
    tl.store(at, (sums * scale).to(dq.dtype.element_ty), mask=(i[:, None] < queries) & (d[None, :] < columns))


@triton.jit
def attention_backward_keys(
    q, k, v, d_out, statistics, delta, dk, dv, bias, mask, slopes, q_lengths, k_lengths, seed,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    bias_b, bias_h, bias_l, bias_k, mask_b, mask_h, mask_l, mask_k, slope_b,
    heads, group, queries, keys, columns, value_columns,
    scale, factor, softcap, window_left, window_right, drop_below, keep_scale,
    BOTTOM_RIGHT: tl.constexpr, IN_PRODUCTS: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_N)
    j0, head = tl.program_id(0) % tiles * BLOCK_N, tl.program_id(0) // tiles
    b, kh = head // (heads // group), head % (heads // group)
    b64, kh64 = b.to(tl.int64), kh.to(tl.int64)
    q_length, k_length = lengths(q_lengths, k_lengths, b, queries, keys, HAS_Q, HAS_K)
    diagonal = k_length - q_length if BOTTOM_RIGHT else 0

    j, d, dc = j0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    exists = j[:, None] < k_length
    at = k + b64 * k_b + kh64 * k_h + j[:, None].to(tl.int64) * k_l + d[None, :]
    k_tile = tl.load(at, mask=exists & (d[None, :] < columns), other=0.0)
    at = v + b64 * v_b + kh64 * v_h + j[:, None].to(tl.int64) * v_l + dc[None, :]
    v_tile = tl.load(at, mask=exists & (dc[None, :] < value_columns), other=0.0)

    dk_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sums = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    all_rows = (tl.num_programs(0) // tiles).to(tl.int64) * group * queries
    # The range of rows that may see one of these keys.
    begin, end = 0, q_length
    if RIGHT:
        begin = tl.maximum(0, j0 - diagonal - window_right) // BLOCK_M * BLOCK_M
    if LEFT:
        end = tl.minimum(q_length, j0 + BLOCK_N - diagonal + window_left)
    end = tl.where(j0 < k_length, end, 0)
    for member in range(0, group):
        h = kh * group + member
        h64 = h.to(tl.int64)
        slope = tl.load(slopes + b64 * slope_b + h) if ALIBI else 0.0
        for i0 in range(begin, end, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M)
            row = (b64 * heads + h) * queries + i
            seen = i[:, None] < q_length
            q_at = q + b64 * q_b + h64 * q_h + i[:, None].to(tl.int64) * q_l + d[None, :]
            q_tile = tl.load(q_at, mask=seen & (d[None, :] < columns), other=0.0)
            do_at = d_out + b64 * do_b + h64 * do_h + i[:, None].to(tl.int64) * do_l + dc[None, :]
            do_tile = tl.load(do_at, mask=seen & (dc[None, :] < value_columns), other=0.0)
            top = tl.load(statistics + row, mask=i < q_length, other=0.0)
            total = tl.load(statistics + all_rows + row, mask=i < q_length, other=0.0)
            row_delta = tl.load(delta + row, mask=i < q_length, other=0.0)
            dropped, _, dx = score_gradients(
                q_tile, k_tile, v_tile, do_tile, i, j, top, total, row_delta, bias + b64 * bias_b + h64 * bias_h,
                mask + b64 * mask_b + h64 * mask_h, slope, seed, row,
                q_length, k_length, diagonal, bias_l, bias_k, mask_l, mask_k, scale, factor, softcap, window_left,
                window_right, drop_below, keep_scale,
                IN_PRODUCTS, SOFTCAP, BIAS, MASK, ALIBI, LEFT, RIGHT, DROPOUT, PRECISION,
            )  # fmt: skip
            # The branch in propagate_nonfinite separates the two products: together they would spill registers.
            dv_sums += tl.dot(tl.trans(dropped).to(do_tile.dtype), finite(do_tile), input_precision=PRECISION)
            dv_sums = propagate_nonfinite(dv_sums, tl.trans(dropped), do_tile)
            dk_sums += tl.dot(tl.trans(dx).to(q_tile.dtype), finite(q_tile), input_precision=PRECISION)
    at = dk + b64 * dk_b + kh64 * dk_h + j[:, None].to(tl.int64) * dk_l + d[None, :]
    tl.store(at, (dk_sums * scale).to(dk.dtype.element_ty), mask=(j[:, None] < keys) & (d[None, :] < columns))
    at = dv + b64 * dv_b + kh64 * dv_h + j[:, None].to(tl.int64) * dv_l + dc[None, :]
    tl.store(at, dv_sums.to(dv.dtype.element_ty), mask=(j[:, None] < keys) & (dc[None, :] < value_columns))
