"""The backward pass of attention for Hopper, in one pass: five products per block of queries and keys, not seven.

    p_ij = 2^(c (q_i . k_j - m_i)) / l_i    dp_ij = do_i . v_j    ds_ij = p_ij (dp_ij - delta_i)
    dv_j = sum_i p_ij do_i    dk_j = scale sum_i ds_ij q_i    dq_i = scale sum_j ds_ij k_j

with delta_i = do_i . o_i - dlse_i, c = scale log2(e) > 0, and m and l of forward.py. p is 0 where row i does not see
key j; forward.py defines reach and the diagonal.

Descriptors, made by the host: q, do [B, Hq, Lq, D] in tiles of BLOCK_M rows; k, v, dk, dv [B, Hk, Lk, D] in tiles of
64; all in tiles of D columns, of 128 with D = 256; stats [B, Hq, 4, L] float32, L a multiple of 128, in tiles of
BLOCK_M columns; dq [B, Hq, Lq, D] float32 in tiles of 64 x 64, zero at first, without the factor scale. Beyond a tensor
TMA reads 0 and writes nothing. Pointers: turns [B, Hq, ceil(Lq / BLOCK_M)] int32, zero at first: the counters; plan
[rounds + 1, programs, FIELDS] int32. scale is c. PARTS: the number of tiles that make the columns of a row.

Saved by the forward pass: o and statistics.

One program per multiprocessor processes blocks of BLOCK_N keys of one key head, one after the other, in the order of
the plan, which the small kernel attention_backward_rows writes before. For each block it loops over the blocks of
queries that see some of its keys, for every query head of the group. Two warpgroups compute, on transposed scores,
[keys, queries]: so p and ds go from registers into the products for dv and dk, whose sums stay in registers. A third
warpgroup holds two warps. One starts TMA copies, through rings as in forward.py; the other starts TMA's additions of dq
to float32 sums in memory.

With D = 64 and 128 a block has 128 keys, of which each warpgroup computes 64 (consume_keys). ds also goes to shared
memory, because dq sums over the keys of both: each computes half of dq, half of its columns or, of 128 queries, half of
its rows. With D = 256 the sums of 64 keys would take 256 registers of every thread. So a block has 64 keys, and each
warpgroup computes half of the columns of dv, dk and dq (consume_columns): 128 registers for the sums. Scores, which sum
over all columns, and dp are each computed once: half of the queries by either warpgroup, so that p and ds go to shared
memory for the other. Of its 227 KiB k and v take 64, two slots of q and of do 128, p and ds 16. dq does not fit, and
leaves through the slots of q and do: when a warpgroup has the other's ds, the other is done with scores and dp, and
from then on each reads only its own columns of these slots. Such a slot is empty when TMA has read dq from it.

Gradients of queries are added up in a fixed order, so that results are the same bits every time. For each block of
queries a counter holds how many blocks of keys have been added; a program waits until all before its own have been. To
spread these waits, the blocks of keys of a head start at different queries, evenly spaced or each at its diagonal. In
even rounds (``turn``) they go up from there, and then from the first block that they need to where they started; in odd
rounds down. Under a causal mask the long blocks of one round so meet the short ones of the next, and start as far apart
as the others end. Within a head, blocks of keys of earlier rounds come first. Within a round those come first that
reach a block of queries in the first part of their way; within a part, going up, the higher blocks of keys, going down,
the lower ones.

This order is free of deadlock. An addition waits only for others of the same query head: of earlier rounds; of the
first part, in the second; of higher or lower blocks of keys in the same part. Every program makes its own in the order
of rounds, heads of the group and parts. Among the additions still to be made consider the least in this order, and of
these the highest (going down, lowest) block of keys: its next addition waits for none. Its program reaches it: all
programs are resident, because the launch is cooperative. Within one program the ring of dq, or the slots of q and do,
drain into this addition, and its computation waits only for its own earlier additions, which have been made.

Memory order: the counter is read with acquire; a proxy fence orders TMA's additions after it; the warp waits until
TMA's additions are written, which makes them visible to it, and then raises the counter with release. One warp does all
this, so that a warp barrier orders its threads.

Products of scores start from 0, so that they have the bits of the forward pass: after subtracting m little else is left
of large ones. Those of dp start from -delta: so ds of a row that sees one key is dp's rounding error, not 0.

Hidden NaN and infinity: where a query does not see a key, scores are -inf and dp starts from 0, so p and ds are 0. But
0 times NaN is NaN, for the NaN of q, k, v and do. So non-finite values are replaced in keys and values, and, in a block
of which not every row sees every key, in q and do. Where they are visible they come back by stats: a row whose l or
delta is not finite has NaN in all its p. For this every product q_i . k_j and do_i . v_j has to be finite in float32.
"""

import triton.language as tl
from fastgru.kernels.attention_sm90.common import ROWS, has_nonfinite, lengths_of, place_of, tile_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: The number of fields that the plan has for every tile, and the index of each.
FIELDS = gl.constexpr(16)
HEAD = gl.constexpr(0)
BLOCK = gl.constexpr(1)
FIRST = gl.constexpr(2)
COUNT = gl.constexpr(3)
START = gl.constexpr(4)
WHOLE = gl.constexpr(5)
WHOLE_END = gl.constexpr(6)
REACH = gl.constexpr(7)
Q_LENGTH = gl.constexpr(8)
K_LENGTH = gl.constexpr(9)
MATES = gl.constexpr(10)
MATES_END = gl.constexpr(11)
TURN = gl.constexpr(12)
STEPS = gl.constexpr(13)
NEXT = gl.constexpr(14)


@gluon.jit
def starts_of(q_length, keys, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The number of blocks of keys that start at the same queries, and the distance to the next start, in blocks of
    queries."""
    end, blocks = gl.maximum(gl.cdiv(q_length, BLOCK_M), 1), gl.cdiv(keys, BLOCK_N)
    return gl.cdiv(blocks, end), gl.maximum(end // blocks, 1)


@gluon.jit
def queries_of(block, q_length, k_length, reach, keys, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first block of queries that sees some of a block of keys, the number of them, and where a program starts."""
    j0 = block * BLOCK_N
    first = gl.maximum(j0 + 1 - reach, 0) // BLOCK_M
    count = gl.where(j0 < k_length, gl.maximum(gl.cdiv(q_length, BLOCK_M) - first, 0), 0)
    together, apart = starts_of(q_length, keys, BLOCK_M, BLOCK_N)
    return first, count, gl.maximum(first, block // together * apart)


@gluon.jit
def queries_at(step, turn, first, count, start):
    """The block of queries of a step: from ``start`` upwards and round; in odd rounds from below it downwards."""
    ahead = start - first + gl.where(turn % 2 == 0, step, count - 1 - step)
    return first + gl.where(ahead >= count, ahead - count, ahead)


@gluon.jit
def queries_of_head(at, step):
    """The block of queries of a step, of one head, of a tile of the plan."""
    return queries_at(step, gl.load(at + TURN), gl.load(at + FIRST), gl.load(at + COUNT), gl.load(at + START))


@gluon.jit
def queries_of_step(at, n):
    """The block of queries of the n-th step, of all heads of the group."""
    return queries_of_head(at, n % gl.load(at + COUNT))


@gluon.jit
def mates_of(turn, head, heads, blocks, programs, section):
    """The blocks of keys of a head, of all sequences, that are taken in a round: first and end."""
    group = head // section
    width = gl.minimum(section, heads - group * section)
    begin = turn * programs - group * section * blocks - head % section
    first = gl.cdiv(gl.maximum(begin, 0), width)
    return first, gl.minimum(gl.cdiv(gl.maximum(begin + programs, 0), width), blocks)


@gluon.jit
def added_before(
    queries, block, turn, mates, end, together, apart, k_length, reach, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """The number of blocks of keys that are added to a block of queries before ``block``, one of [mates, end) of this
    round. A query that sees a block of keys also sees all blocks before it."""
    end = gl.minimum(end, gl.cdiv(k_length, BLOCK_N))
    # Of the visible ones the first start at these queries or before.
    end = gl.minimum(end, ((queries + 1) * BLOCK_M + reach - 2 + BLOCK_N) // BLOCK_N)
    middle = gl.maximum(gl.minimum(end, (queries // apart + 1) * together), mates)
    up = gl.where(block < middle, middle - 1 - block, middle - mates + end - 1 - block)
    down = gl.where(block < middle, end - middle + block - mates, block - middle)
    return mates + gl.where(turn % 2 == 0, up, down)


@gluon.jit
def write_plan(
    plan, programs, batch, heads, group, queries, keys, q_lengths, k_lengths, flags, right, section,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Writes the plan of 128 tiles, one per thread."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    blocks = gl.cdiv(keys, BLOCK_N)
    tiles = batch * heads * blocks
    slot = gl.program_id(0) * 128 + gl.arange(0, 128, layout)
    turn, program = slot // programs, slot % programs
    tile = tile_of(turn, program, programs)
    here = tile < tiles
    # The first blocks of keys of all heads, which most queries see under a causal mask, come first.
    head, last = place_of(gl.where(here, tile, 0), batch * heads, blocks, section)
    block = blocks - 1 - last
    q_length, k_length = lengths_of(head // heads, q_lengths, k_lengths, flags, queries, keys)
    reach = right + 1 + gl.where(flags & 4 != 0, k_length - q_length, 0)
    first, count, start = queries_of(block, q_length, k_length, reach, keys, BLOCK_M, BLOCK_N)
    # The end of the blocks of queries of which every row sees every key.
    whole_end = gl.where((block + 1) * BLOCK_N <= k_length, q_length // BLOCK_M, 0)
    mates, mates_end = mates_of(turn, head, batch * heads, blocks, programs, section)
    at = plan + slot * FIELDS
    # One more round without tiles ends every program's list.
    given = slot < (gl.cdiv(tiles, programs) + 1) * programs
    gl.store(at + HEAD, gl.where(here, head, -1), mask=given)
    gl.store(at + BLOCK, block, mask=given)
    gl.store(at + FIRST, first, mask=given)
    gl.store(at + COUNT, count, mask=given)
    gl.store(at + START, start, mask=given)
    gl.store(at + WHOLE, gl.cdiv(gl.maximum((block + 1) * BLOCK_N - reach, 0), BLOCK_M), mask=given)
    gl.store(at + WHOLE_END, whole_end, mask=given)
    gl.store(at + REACH, reach, mask=given)
    gl.store(at + Q_LENGTH, q_length, mask=given)
    gl.store(at + K_LENGTH, k_length, mask=given)
    gl.store(at + MATES, mates, mask=given)
    gl.store(at + MATES_END, mates_end, mask=given)
    gl.store(at + TURN, turn, mask=given)
    gl.store(at + STEPS, group * count, mask=given)
    gl.store(at + NEXT, programs * FIELDS, mask=given)


@gluon.jit
def half_of(at, heads, HALF: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr):
    """The position of one half of a block of keys: half of its keys, or half of its columns."""
    head = gl.load(at + HEAD)
    j0 = gl.load(at + BLOCK) * BLOCK_N
    if BLOCK_N == ROWS:
        return head // heads, head % heads, j0, HALF * COLUMNS
    else:
        return head // heads, head % heads, j0 + HALF * ROWS, 0


@gluon.jit
def mask_hidden(x, value, at, j0, i0):
    """x [64, queries], of the keys from j0 on and the queries from i0 on, with ``value`` where a query does not see a
    key. As keep_below of common.py, by the first column that sees each row."""
    layout: gl.constexpr = x.type.layout
    parts = x.reshape([x.shape[0], x.shape[1] // 8, 8])
    inner: gl.constexpr = parts.type.layout
    j = j0 + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, inner)))
    first = gl.where(j < gl.load(at + K_LENGTH), j + 1 - gl.load(at + REACH) - i0, x.shape[1])
    high = gl.arange(0, x.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, inner)))
    low = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, inner)))
    left = first[:, None] - 8 * high[None, :]
    parts = gl.where(low[None, None, :] >= left[:, :, None], parts, value)
    return gl.convert_layout(parts.reshape(x.shape), layout, assert_trivial=True)


@gluon.jit
def make_finite(tile, LENGTH: gl.constexpr, D: gl.constexpr):
    """Replaces NaN by 0 and infinity by a large number in a tile [LENGTH, D] of shared memory, so that scores of
    infinite keys stay extreme: 2^59, whose products can still be summed, or 65504."""
    across: gl.constexpr = min(32, D // 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    exponent: gl.constexpr = 0x7F80 if tile.dtype == gl.bfloat16 else 0x7C00
    large: gl.constexpr = 0x5D00 if tile.dtype == gl.bfloat16 else 0x7BFF
    for part in gl.static_range(LENGTH // 32):
        room = tile.slice(32 * part, 32)
        bits = room.load(layout).to(gl.int16, bitcast=True)
        size = bits & 0x7FFF
        limited = gl.where(size == exponent, bits - (exponent - large), gl.where(size > exponent, 0, bits))
        room.store(limited.to(gl.int16).to(tile.dtype, bitcast=True))


@gluon.jit
def fence_async_global():
    """Orders earlier reads of global memory before later accesses by TMA."""
    gl.inline_asm("fence.proxy.async.global;", "", [], [], is_pure=False)


@gluon.jit
def attention_backward_rows(
    o_desc, do_desc, statistics, d_lse, stats, plan, q_lengths, k_lengths, flags, right, section, programs, heads, keys,
    padded, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The small kernel before the main one: computes what is subtracted from scores and dp of each row, and the plan.

    Descriptors: o, do [B, Hq, Lq, D] in tiles of 64 rows and up to 128 columns. Pointers: statistics and, or null (bit
    3 of ``flags``), d_lse [B, Hq, Lq] float32 contiguous; stats [B, Hq, 4, padded], written: the start of products
    of scores, m, 1 / l and -delta. The first is 0; -inf for a row that sees no key; and NaN for one with NaN or
    infinity in o, do or l, whose p become NaN. plan [tiles, FIELDS] int32, written. Programs: enough for the rows, 64
    each, and for the plan, 128 tiles each.
    """
    COLUMNS: gl.constexpr = o_desc.block_shape[3]
    PARTS: gl.constexpr = 2 * ROWS // BLOCK_N
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    batch, query_heads, queries = o_desc.shape[0], o_desc.shape[1], o_desc.shape[2]
    write_plan(
        plan, programs, batch, heads, query_heads // heads, queries, keys, q_lengths, k_lengths, flags, right, section,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    blocks = padded // 64
    head = gl.program_id(0) // blocks
    if head < batch * query_heads:
        o_tiles = gl.allocate_shared_memory(o_desc.dtype, [PARTS] + o_desc.block_shape, o_desc.layout)
        do_tiles = gl.allocate_shared_memory(do_desc.dtype, [PARTS] + do_desc.block_shape, do_desc.layout)
        full = mbarrier.allocate_mbarrier()
        mbarrier.init(full, count=1)
        fence_async_shared()
        i0 = gl.program_id(0) % blocks * 64
        b, h = head // query_heads, head % query_heads
        mbarrier.expect(full, PARTS * (o_desc.nbytes_per_cta + do_desc.nbytes_per_cta))
        for part in gl.static_range(PARTS):
            tma.async_load(o_desc, [b, h, i0, part * COLUMNS], full, o_tiles.index(part))
            tma.async_load(do_desc, [b, h, i0, part * COLUMNS], full, do_tiles.index(part))
        i = i0 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        row = head.to(gl.int64) * queries + i
        top = gl.load(statistics + row, mask=i < queries, other=0.0)
        all_rows = (batch * query_heads).to(gl.int64) * queries
        total = gl.load(statistics + all_rows + row, mask=i < queries, other=0.0)
        row_d_lse = gl.load(d_lse + row, mask=(i < queries) & (flags & 8 != 0), other=0.0)
        mbarrier.wait(full, 0)
        delta = -row_d_lse
        for part in gl.static_range(PARTS):
            out = o_tiles.index(part).reshape([64, COLUMNS]).load(layout).to(gl.float32)
            d_out = do_tiles.index(part).reshape([64, COLUMNS]).load(layout).to(gl.float32)
            delta += gl.sum(out * d_out, 1)
        empty = total == 0.0
        sound = (delta - delta == 0.0) & (total - total == 0.0)
        at = stats + head.to(gl.int64) * 4 * padded + i
        gl.store(at, gl.where(empty, float("-inf"), gl.where(sound, 0.0, float("nan"))))
        gl.store(at + padded, gl.where(sound, top, 0.0))
        gl.store(at + 2 * padded, gl.where(sound & (total > 0.0), 1.0 / gl.where(empty, 1.0, total), 0.0))
        gl.store(at + 3 * padded, gl.where(empty, 0.0, -delta))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, do_desc, stats_desc, plan, rings, barriers,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: one warp that starts all copies."""
    COLUMNS: gl.constexpr = q_desc.block_shape[3]
    PARTS: gl.constexpr = 2 * ROWS // BLOCK_N
    q_ring, do_ring, stats_ring, k_room, v_room = rings
    q_full, q_empty, do_full, do_empty, keys_full, keys_empty, _keys_clean = barriers
    heads = k_desc.shape[1]
    group = q_desc.shape[1] // heads
    done = 0
    at = plan
    while gl.load(at + HEAD) >= 0:
        b, h = gl.load(at + HEAD) // heads, gl.load(at + HEAD) % heads
        mbarrier.wait(keys_empty, (gl.load(at + TURN) & 1) ^ 1)
        mbarrier.expect(keys_full, 2 * k_desc.nbytes_per_cta + 2 * v_desc.nbytes_per_cta)
        for half in gl.static_range(2):
            place = half_of(at, heads, half, BLOCK_N, COLUMNS)
            tma.async_load(k_desc, place, keys_full, k_room.index(half))
            tma.async_load(v_desc, place, keys_full, v_room.index(half))
        for query_head in range(h * group, h * group + group):
            for step in range(gl.load(at + COUNT)):
                i0 = queries_of_head(at, step) * BLOCK_M
                slot = done % STAGES
                phase = (done // STAGES & 1) ^ 1
                # The slot of do becomes empty before that of q.
                mbarrier.wait(do_empty.index(slot), phase)
                mbarrier.expect(do_full.index(slot), PARTS * do_desc.nbytes_per_cta)
                for part in gl.static_range(PARTS):
                    place = [b, query_head, i0, part * COLUMNS]
                    tma.async_load(do_desc, place, do_full.index(slot), do_ring.index(PARTS * slot + part))
                mbarrier.wait(q_empty.index(slot), phase)
                mbarrier.expect(q_full.index(slot), PARTS * q_desc.nbytes_per_cta + stats_desc.nbytes_per_cta)
                for part in gl.static_range(PARTS):
                    place = [b, query_head, i0, part * COLUMNS]
                    tma.async_load(q_desc, place, q_full.index(slot), q_ring.index(PARTS * slot + part))
                tma.async_load(stats_desc, [b, query_head, 0, i0], q_full.index(slot), stats_ring.index(slot))
                done += 1
        at += gl.load(at + NEXT)


@gluon.jit
def add_queries(
    dq_desc, k_desc, turns, plan, dq_rings, dq_full, dq_empties,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DQ_STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that adds dq to memory in order; each of ``dq_rings`` has two tiles of it."""
    PARTS: gl.constexpr = 2 * ROWS // BLOCK_N
    heads = k_desc.shape[1]
    group = dq_desc.shape[1] // heads
    done = 0
    at = plan
    while gl.load(at + HEAD) >= 0:
        b, h = gl.load(at + HEAD) // heads, gl.load(at + HEAD) % heads
        together, apart = starts_of(gl.load(at + Q_LENGTH), k_desc.shape[2], BLOCK_M, BLOCK_N)
        for query_head in range(h * group, h * group + group):
            for step in range(gl.load(at + COUNT)):
                i = queries_of_head(at, step)
                before = added_before(
                    i, gl.load(at + BLOCK), gl.load(at + TURN), gl.load(at + MATES), gl.load(at + MATES_END),
                    together, apart, gl.load(at + K_LENGTH), gl.load(at + REACH), BLOCK_M, BLOCK_N,
                )  # fmt: skip
                row = (b * dq_desc.shape[1] + query_head).to(gl.int64)
                counter = turns + row * gl.cdiv(dq_desc.shape[2], BLOCK_M) + i
                slot = done % DQ_STAGES
                for part in gl.static_range(PARTS):
                    for half in gl.static_range(2):
                        mbarrier.wait(dq_full.index(2 * (PARTS * slot + part) + half), done // DQ_STAGES & 1)
                    if part == 0:
                        gl.atomic_poll(counter, before, sem="acquire", scope="gpu")
                        fence_async_global()
                    for half in gl.static_range(2):
                        if BLOCK_M == 64:
                            place = [b, query_head, i * BLOCK_M, (PARTS * half + part) * 64]
                        else:
                            place = [b, query_head, i * BLOCK_M + half * 64, 0]
                        tma.async_atomic_add(dq_desc, place, dq_rings[part].index(2 * slot + half))
                    tma.store_wait(0)
                    mbarrier.arrive(dq_empties[part].index(slot))
                tma.store_wait(0, read_only=False)
                gl.barrier()
                gl.atomic_add(counter, 1, sem="release", scope="gpu")
                done += 1
        at += gl.load(at + NEXT)


@gluon.jit
def operands_of_dq(ds, k_room, HALF: gl.constexpr, WHO: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """ds [64, 64 keys] and the keys [64 keys, 64] that one half of the keys adds to one half of dq."""
    keys = k_room.index(HALF).reshape([ROWS, D])
    if BLOCK_M == 64:
        return ds.permute([1, 0]), keys.slice(64 * WHO, 64, dim=1)
    else:
        return ds.slice(64 * WHO, 64, dim=1).permute([1, 0]), keys


@gluon.jit
def consume_keys(
    dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_ring, barriers, ds_full, ds_empty, dq_full, dq_empty,
    WHO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr, DQ_STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: the warpgroup that computes keys [64 WHO, 64 WHO + 64) of every block of 128.

    Registers are scarce: a step reads the plan anew, and nothing is kept across a loop that can be computed in it.
    """
    D: gl.constexpr = dk_desc.block_shape[3]
    dtype: gl.constexpr = dk_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    query_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)

    q_ring, do_ring, stats_ring, k_room, v_room = rings
    q_full, q_empty, do_full, do_empty, keys_full, keys_empty, _keys_clean = barriers
    no_scores = gl.zeros([ROWS, BLOCK_M], gl.float32, scores)
    no_sums = gl.zeros([64, 64], gl.float32, query_sums)
    k = k_room.index(WHO).reshape([ROWS, D])
    v = v_room.index(WHO).reshape([ROWS, D])
    done = 0
    at = plan
    while tl.condition(gl.load(at + HEAD) >= 0, disable_licm=True):
        dk = gl.zeros([ROWS, D], gl.float32, sums)
        dv = gl.zeros([ROWS, D], gl.float32, sums)
        mbarrier.wait(keys_full, gl.load(at + TURN) & 1)
        if has_nonfinite(k, ROWS, D) | has_nonfinite(v, ROWS, D):
            make_finite(k, ROWS, D)
            make_finite(v, ROWS, D)
            fence_async_shared()
            gl.barrier()
        for n in tl.range(0, gl.load(at + STEPS), disable_licm=True):
            slot = done % STAGES
            phase = done // STAGES & 1
            ds_slot = done % DS_STAGES
            ds_phase = done // DS_STAGES & 1
            q = q_ring.index(slot).reshape([BLOCK_M, D])
            do = do_ring.index(slot).reshape([BLOCK_M, D])
            stats = stats_ring.index(slot).reshape([4, BLOCK_M])
            own = ds_ring.index(2 * ds_slot + WHO)
            other = ds_ring.index(2 * ds_slot + 1 - WHO)

            mbarrier.wait(q_full.index(slot), phase)
            mbarrier.wait(do_full.index(slot), phase)
            i = queries_of_step(at, n)
            part = (i < gl.load(at + WHOLE)) | (i >= gl.load(at + WHOLE_END))
            if part:
                # The other warpgroup does the same, possibly later: it then writes identical values.
                if has_nonfinite(q, BLOCK_M, D) | has_nonfinite(do, BLOCK_M, D):
                    make_finite(q, BLOCK_M, D)
                    make_finite(do, BLOCK_M, D)
                fence_async_shared()
                gl.barrier()
            s, _ = gl.broadcast(stats.slice(0, 1).load(scores), no_scores)
            dp, _ = gl.broadcast(stats.slice(3, 1).load(scores), no_scores)
            if part:
                j0 = half_of(at, 1, WHO, 2 * ROWS, D)[2]
                if BLOCK_M == 64:
                    s = mask_hidden(s, float("-inf"), at, j0, i * BLOCK_M)
                dp = mask_hidden(dp, 0.0, at, j0, i * BLOCK_M)
            s = warpgroup_mma(k, q.permute([1, 0]), s, is_async=True)
            dp = warpgroup_mma(v, do.permute([1, 0]), dp, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            s -= stats.slice(1, 1).load(scores)
            # With 128 queries masking takes too many registers before the products. With 64 the products would wait for
            # each other if masking stood here.
            if BLOCK_M == 128:  # noqa: SIM102
                if part:
                    s = mask_hidden(s, float("-inf"), at, half_of(at, 1, WHO, 2 * ROWS, D)[2], i * BLOCK_M)
            p = gl.exp2(s * scale)
            dp = warpgroup_mma_wait(0, deps=[dp])
            # Not earlier: these values take the registers of the subtracted maxima.
            p *= stats.slice(2, 1).load(scores)
            slopes = (p * dp).to(dtype)
            weights = gl.convert_layout(p.to(dtype), operand, assert_trivial=True)
            dv = warpgroup_mma(weights, do, dv, is_async=True)
            mbarrier.wait(ds_empty.index(ds_slot), ds_phase ^ 1)
            own.store(slopes)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(2 * ds_slot + WHO))
            mbarrier.wait(ds_full.index(2 * ds_slot + WHO), ds_phase)
            left, right = operands_of_dq(own, k_room, WHO, WHO, BLOCK_M, D)
            dq = warpgroup_mma(left, right, no_sums, use_acc=False, is_async=True)
            mbarrier.wait(ds_full.index(2 * ds_slot + 1 - WHO), ds_phase)
            left, right = operands_of_dq(other, k_room, 1 - WHO, WHO, BLOCK_M, D)
            dq = warpgroup_mma(left, right, dq, is_async=True)
            slopes = gl.convert_layout(slopes, operand, assert_trivial=True)
            dk = warpgroup_mma(slopes, q, dk, is_async=True)
            dv, dq, weights = warpgroup_mma_wait(1, deps=[dv, dq, weights])
            mbarrier.arrive(do_empty.index(slot))
            mbarrier.arrive(ds_empty.index(ds_slot))
            # While dk is computed.
            dq_slot = done % DQ_STAGES
            mbarrier.wait(dq_empty.index(dq_slot), (done // DQ_STAGES & 1) ^ 1)
            dq_ring.index(2 * dq_slot + WHO).reshape([64, 64]).store(dq)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(2 * dq_slot + WHO))
            dk, slopes = warpgroup_mma_wait(0, deps=[dk, slopes])
            mbarrier.arrive(q_empty.index(slot))
            done += 1

        # Reuses k and v. Of v this warpgroup alone reads its half; of k the other one reads it too, for dq.
        v.store(dv.to(dtype))
        if done > 0:
            mbarrier.wait(ds_empty.index((done - 1) % DS_STAGES), (done - 1) // DS_STAGES & 1)
        k.store((dk * (scale * 0.6931471805599453)).to(dtype))
        fence_async_shared()
        place = half_of(at, dk_desc.shape[1], WHO, 2 * ROWS, D)
        tma.async_store(dv_desc, place, v_room.index(WHO))
        tma.async_store(dk_desc, place, k_room.index(WHO))
        tma.store_wait(0)
        mbarrier.arrive(keys_empty)
        at += gl.load(at + NEXT)


@gluon.jit
def columns_of(ring, slot, HALF: gl.constexpr, COLUMNS: gl.constexpr):
    """Half of the columns of a block of 64 queries, or of keys: [64, COLUMNS]."""
    return ring.index(2 * slot + HALF).reshape([ROWS, COLUMNS])


@gluon.jit
def consume_columns(
    dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_rings, barriers, ds_full, ds_empty, dq_full,
    WHO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: the warpgroup that computes, of every block of 64 keys, scores of queries [32 WHO, 32 WHO + 32) and
    columns [128 WHO, 128 WHO + 128) of the sums.

    Its own p and ds go from registers into the products for dv and dk, without waiting for the other's. The second half
    of dq is computed after dk, so that both never need registers at once, and overwrites q.
    """
    COLUMNS: gl.constexpr = dk_desc.block_shape[3]
    HALF: gl.constexpr = BLOCK_M // 2
    dtype: gl.constexpr = dk_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    query_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    OWN: gl.constexpr = HALF * WHO
    OTHER: gl.constexpr = HALF * (1 - WHO)

    q_ring, do_ring, stats_ring, k_room, v_room = rings
    q_full, _q_empty, do_full, _do_empty, keys_full, keys_empty, keys_clean = barriers
    no_scores = gl.zeros([ROWS, HALF], gl.float32, scores)
    no_sums = gl.zeros([64, 64], gl.float32, query_sums)
    k = k_room.index(WHO).reshape([ROWS, COLUMNS])
    v = v_room.index(WHO).reshape([ROWS, COLUMNS])
    done = 0
    at = plan
    while tl.condition(gl.load(at + HEAD) >= 0, disable_licm=True):
        dk = gl.zeros([ROWS, COLUMNS], gl.float32, sums)
        dv = gl.zeros([ROWS, COLUMNS], gl.float32, sums)
        mbarrier.wait(keys_full, gl.load(at + TURN) & 1)
        if has_nonfinite(k, ROWS, COLUMNS) | has_nonfinite(v, ROWS, COLUMNS):
            make_finite(k, ROWS, COLUMNS)
            make_finite(v, ROWS, COLUMNS)
            fence_async_shared()
        mbarrier.arrive(keys_clean)
        mbarrier.wait(keys_clean, gl.load(at + TURN) & 1)
        i = queries_of_head(at, 0)
        for n in tl.range(0, gl.load(at + STEPS), disable_licm=True):
            slot = done % STAGES
            phase = done // STAGES & 1
            ds_slot = done % DS_STAGES
            ds_phase = done // DS_STAGES & 1
            stats = stats_ring.index(slot).reshape([4, BLOCK_M]).slice(OWN, HALF, dim=1)
            weights_room = ds_ring.index(2 * ds_slot)
            slopes_room = ds_ring.index(2 * ds_slot + 1)

            mbarrier.wait(q_full.index(slot), phase)
            mbarrier.wait(do_full.index(slot), phase)
            part = (i < gl.load(at + WHOLE)) | (i >= gl.load(at + WHOLE_END))
            if part:
                for half in gl.static_range(2):
                    q = columns_of(q_ring, slot, half, COLUMNS).slice(OWN, HALF)
                    do = columns_of(do_ring, slot, half, COLUMNS).slice(OWN, HALF)
                    if has_nonfinite(q, HALF, COLUMNS) | has_nonfinite(do, HALF, COLUMNS):
                        make_finite(q, HALF, COLUMNS)
                        make_finite(do, HALF, COLUMNS)
                fence_async_shared()
                gl.barrier()
            s, _ = gl.broadcast(stats.slice(0, 1).load(scores), no_scores)
            dp, _ = gl.broadcast(stats.slice(3, 1).load(scores), no_scores)
            if part:
                j0 = half_of(at, 1, WHO, ROWS, COLUMNS)[2]
                s = mask_hidden(s, float("-inf"), at, j0, i * BLOCK_M + OWN)
                dp = mask_hidden(dp, 0.0, at, j0, i * BLOCK_M + OWN)
            for half in gl.static_range(2):
                q = columns_of(q_ring, slot, half, COLUMNS).slice(OWN, HALF)
                s = warpgroup_mma(columns_of(k_room, 0, half, COLUMNS), q.permute([1, 0]), s, is_async=True)
            for half in gl.static_range(2):
                do = columns_of(do_ring, slot, half, COLUMNS).slice(OWN, HALF)
                dp = warpgroup_mma(columns_of(v_room, 0, half, COLUMNS), do.permute([1, 0]), dp, is_async=True)
            s = warpgroup_mma_wait(2, deps=[s])
            p = gl.exp2((s - stats.slice(1, 1).load(scores)) * scale) * stats.slice(2, 1).load(scores)
            q = columns_of(q_ring, slot, WHO, COLUMNS)
            do = columns_of(do_ring, slot, WHO, COLUMNS)
            weights = gl.convert_layout(p.to(dtype), operand, assert_trivial=True)
            dv = warpgroup_mma(weights, do.slice(OWN, HALF), dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            slopes = (p * dp).to(dtype)
            mbarrier.wait(ds_empty.index(ds_slot), ds_phase ^ 1)
            weights_room.slice(OWN, HALF).permute([1, 0]).store(p.to(dtype))
            slopes_room.slice(OWN, HALF).permute([1, 0]).store(slopes)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(2 * ds_slot + WHO))
            mbarrier.wait(ds_full.index(2 * ds_slot + WHO), ds_phase)
            mbarrier.wait(ds_full.index(2 * ds_slot + 1 - WHO), ds_phase)
            others = weights_room.slice(OTHER, HALF).permute([1, 0])
            dv = warpgroup_mma(others, do.slice(OTHER, HALF), dv, is_async=True)
            dq = warpgroup_mma(slopes_room, k.slice(0, 64, dim=1), no_sums, use_acc=False, is_async=True)
            slopes = gl.convert_layout(slopes, operand, assert_trivial=True)
            dk = warpgroup_mma(slopes, q.slice(OWN, HALF), dk, is_async=True)
            others = slopes_room.slice(OTHER, HALF).permute([1, 0])
            dk = warpgroup_mma(others, q.slice(OTHER, HALF), dk, is_async=True)
            # While dk is computed.
            i = queries_of_step(at, n + 1)
            dv, dq, weights = warpgroup_mma_wait(2, deps=[dv, dq, weights])
            dq_rings[0].index(2 * slot + WHO).reshape([64, 64]).store(dq)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(4 * slot + WHO))
            dq = warpgroup_mma(slopes_room, k.slice(64, 64, dim=1), no_sums, use_acc=False, is_async=True)
            dk, dq, slopes = warpgroup_mma_wait(0, deps=[dk, dq, slopes])
            mbarrier.arrive(ds_empty.index(ds_slot))
            dq_rings[1].index(2 * slot + WHO).reshape([64, 64]).store(dq)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(4 * slot + 2 + WHO))
            done += 1

        # Reuses k and v: the other warpgroup reads these columns for scores and dp only.
        v.store(dv.to(dtype))
        k.store((dk * (scale * 0.6931471805599453)).to(dtype))
        fence_async_shared()
        place = half_of(at, dk_desc.shape[1], WHO, ROWS, COLUMNS)
        tma.async_store(dv_desc, place, v_room.index(WHO))
        tma.async_store(dk_desc, place, k_room.index(WHO))
        tma.store_wait(0)
        mbarrier.arrive(keys_empty)
        at += gl.load(at + NEXT)


@gluon.jit
def consume(
    dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_rings, barriers, ds_full, ds_empty, dq_full, dq_empties,
    WHO: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: consume_columns or consume_keys, by the size of a block of keys."""
    if BLOCK_N == ROWS:
        consume_columns(
            dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_rings, barriers, ds_full, ds_empty, dq_full, WHO,
            BLOCK_M, STAGES, DS_STAGES,
        )  # fmt: skip
    else:
        consume_keys(
            dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_rings[0], barriers, ds_full, ds_empty, dq_full,
            dq_empties[0], WHO, BLOCK_M, STAGES, DS_STAGES, DQ_STAGES,
        )  # fmt: skip


@gluon.jit
def attention_backward(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dq_desc, dk_desc, dv_desc, turns, plan, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    PARTS: gl.constexpr = 2 * ROWS // BLOCK_N
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [PARTS * STAGES] + q_desc.block_shape, q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [PARTS * STAGES] + do_desc.block_shape, do_desc.layout)
    stats_ring = gl.allocate_shared_memory(gl.float32, [STAGES] + stats_desc.block_shape, stats_desc.layout)
    k_room = gl.allocate_shared_memory(dtype, [2] + k_desc.block_shape, k_desc.layout)
    v_room = gl.allocate_shared_memory(dtype, [2] + v_desc.block_shape, v_desc.layout)
    # ds [keys, queries] of either warpgroup; or p and ds of both, [queries, keys].
    ds_ring = gl.allocate_shared_memory(dtype, [2 * DS_STAGES, ROWS, BLOCK_M], swizzled)
    q_full = mbarrier.allocate_mbarrier(batch=STAGES)
    q_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    do_full = mbarrier.allocate_mbarrier(batch=STAGES)
    do_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    ds_full = mbarrier.allocate_mbarrier(batch=2 * DS_STAGES)
    ds_empty = mbarrier.allocate_mbarrier(batch=DS_STAGES)
    dq_full = mbarrier.allocate_mbarrier(batch=2 * PARTS * DQ_STAGES)
    keys = mbarrier.allocate_mbarrier(batch=3)
    dq_tiles: gl.constexpr = [2 * DQ_STAGES] + dq_desc.block_shape
    if BLOCK_N == ROWS:
        # A slot of q or do is empty when TMA has added the dq that overwrote it.
        dq_rings = (
            do_ring.reinterpret(gl.float32, dq_tiles, dq_desc.layout),
            q_ring.reinterpret(gl.float32, dq_tiles, dq_desc.layout),
        )
        dq_empties = (do_empty, q_empty)
    else:
        dq_rings = (gl.allocate_shared_memory(gl.float32, dq_tiles, dq_desc.layout),)
        dq_empties = (mbarrier.allocate_mbarrier(batch=DQ_STAGES),)
        for n in gl.static_range(DQ_STAGES):
            mbarrier.init(dq_empties[0].index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(do_full.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=BLOCK_N // ROWS)
        mbarrier.init(do_empty.index(n), count=BLOCK_N // ROWS)
    for n in gl.static_range(DS_STAGES):
        mbarrier.init(ds_full.index(2 * n), count=1)
        mbarrier.init(ds_full.index(2 * n + 1), count=1)
        mbarrier.init(ds_empty.index(n), count=2)
    for n in gl.static_range(2 * PARTS * DQ_STAGES):
        mbarrier.init(dq_full.index(n), count=1)
    mbarrier.init(keys.index(0), count=1)
    mbarrier.init(keys.index(1), count=2)
    mbarrier.init(keys.index(2), count=2)
    fence_async_shared()

    plan += gl.program_id(0) * FIELDS
    rings = (q_ring, do_ring, stats_ring, k_room, v_room)
    barriers = (q_full, q_empty, do_full, do_empty, keys.index(0), keys.index(1), keys.index(2))
    gl.warp_specialize(
        [
            (
                consume,
                (
                    dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_rings, barriers, ds_full, ds_empty, dq_full,
                    dq_empties, 0, BLOCK_M, BLOCK_N, STAGES, DS_STAGES, DQ_STAGES,
                ),
            ),
            (
                consume,
                (
                    dk_desc, dv_desc, plan, scale, rings, ds_ring, dq_rings, barriers, ds_full, ds_empty, dq_full,
                    dq_empties, 1, BLOCK_M, BLOCK_N, STAGES, DS_STAGES, DQ_STAGES,
                ),
            ),
            (produce, (q_desc, k_desc, v_desc, do_desc, stats_desc, plan, rings, barriers, BLOCK_M, BLOCK_N, STAGES)),
            (
                add_queries,
                (dq_desc, k_desc, turns, plan, dq_rings, dq_full, dq_empties, BLOCK_M, BLOCK_N, DQ_STAGES),
            ),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip
