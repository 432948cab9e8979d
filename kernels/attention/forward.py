"""The forward pass of attention in Triton: o_i = sum_j p_ij v_j with p = softmax(s), by online softmax.

    m' = max(m, max_j s)    l' = l 2^(c(m - m')) + sum_j 2^(c(s - m'))
                            o' = o 2^(c(m - m')) + sum_j drop(2^(c(s - m'))) v_j

scores.py has s. c, ``factor``, is log2(e); or scale log2(e) where s and m are in units of the products q . k
(IN_PRODUCTS). Exponents are multiples of differences, never differences of multiples, whose rounding is that of the
score: so they are exact for scores of any size.

One program computes a tile of queries of one head and one split of its keys. With several splits (few queries, many
keys) each writes its own out, in float32, and its own statistics, and no lse: the caller combines them. Pointers:

    q [B, Hq, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv], out [B, Hq, Lq, Dv]: the last stride is 1, the others any
    lse [B, Hq, Lq] and statistics [2, B, Hq, Lq], m and l, both 0 for a row that sees no key: contiguous, float32;
    out and statistics of split n lie n split_o and n split_statistics elements further
    bias, mask: [B, Hq, Lq, Lk], strides 0 where broadcast; slopes [B or 1, Hq] float32; q_lengths, k_lengths [B] int64
    seed: one int64

Saved for backward: out and statistics.
"""

import triton
import triton.language as tl
from fastgru.kernels.attention.scores import dropout_keep, finite, key_range, lengths, propagate_nonfinite, scores


@triton.jit
def attention_forward(
    q, k, v, out, lse, statistics, bias, mask, slopes, q_lengths, k_lengths, seed,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, split_o, split_statistics,
    bias_b, bias_h, bias_l, bias_k, mask_b, mask_h, mask_l, mask_k, slope_b,
    heads, group, queries, keys, columns, value_columns,
    scale, factor, softcap, window_left, window_right, drop_below, keep_scale,
    BOTTOM_RIGHT: tl.constexpr, IN_PRODUCTS: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    i0, head = tl.program_id(0) % tiles * BLOCK_M, tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    b64, h64, kh64 = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64)
    q_length, k_length = lengths(q_lengths, k_lengths, b, queries, keys, HAS_Q, HAS_K)
    diagonal = k_length - q_length if BOTTOM_RIGHT else 0

    i, d, dv = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = q + b64 * q_b + h64 * q_h + i[:, None].to(tl.int64) * q_l + d[None, :]
    q_tile = tl.load(at, mask=(i[:, None] < q_length) & (d[None, :] < columns), other=0.0)
    bias += b64 * bias_b + h64 * bias_h
    mask += b64 * mask_b + h64 * mask_h
    k += b64 * k_b + kh64 * k_h
    v += b64 * v_b + kh64 * v_h
    slope = tl.load(slopes + b64 * slope_b + h) if ALIBI else 0.0

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    begin, end = key_range(i0, q_length, k_length, diagonal, window_left, window_right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), tl.num_programs(1)) * BLOCK_N
    begin += split * share
    end = tl.minimum(end, begin + share)
    out += split.to(tl.int64) * split_o
    statistics += split.to(tl.int64) * split_statistics
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        exists = j[:, None] < k_length
        k_tile = tl.load(
            k + j[:, None].to(tl.int64) * k_l + d[None, :], mask=exists & (d[None, :] < columns), other=0.0
        )
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s, _ = scores(
            x, i, j, bias, mask, slope, q_length, k_length, diagonal, bias_l, bias_k, mask_l, mask_k, scale, softcap,
            IN_PRODUCTS, SOFTCAP, BIAS, MASK, ALIBI, LEFT, RIGHT, window_left, window_right,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - base[:, None]) * factor)
        decay = tl.exp2((top - base) * factor)
        total = total * decay + tl.sum(p, 1)
        top = new_top
        if DROPOUT:
            row = (b64 * heads + h) * queries + i
            p = tl.where(dropout_keep(tl.load(seed), row, j, drop_below), p, 0.0)
        v_at = v + j[:, None].to(tl.int64) * v_l + dv[None, :]
        v_tile = tl.load(v_at, mask=exists & (dv[None, :] < value_columns), other=0.0)
        sums = sums * decay[:, None] + tl.dot(p.to(v_tile.dtype), finite(v_tile), input_precision=PRECISION)
        sums = propagate_nonfinite(sums, p, v_tile)

    empty = total == 0.0
    o = sums * tl.where(empty, 0.0, keep_scale / tl.where(empty, 1.0, total))[:, None]
    at = out + b64 * o_b + h64 * o_h + i[:, None].to(tl.int64) * o_l + dv[None, :]
    tl.store(at, o.to(out.dtype.element_ty), mask=(i[:, None] < queries) & (dv[None, :] < value_columns))
    row = (b64 * heads + h) * queries + i
    all_rows = (tl.num_programs(0) // tiles).to(tl.int64) * queries
    # -inf: the row sees no key, or only NaN.
    reference = tl.where(top == float("-inf"), 0.0, top)
    tl.store(statistics + row, reference, mask=i < queries)
    tl.store(statistics + all_rows + row, total, mask=i < queries)
    if tl.num_programs(1) == 1:
        largest = reference * scale if IN_PRODUCTS else reference
        row_lse = tl.where(empty, float("-inf"), largest + tl.log(tl.where(empty, 1.0, total)))
        tl.store(lse + row, row_lse, mask=i < queries)
