"""The forward pass of attention for Hopper: o_i = sum_j p_ij v_j over the keys j < min(k_length, i + reach).

    m' = max(m, max_j s)    l' = l 2^(c(m - m')) + sum_j 2^(c(s - m'))    o' = o 2^(c(m - m')) + sum_j 2^(c(s - m')) v_j

with s = q_i . k_j and c = scale log2(e) > 0; lse = c ln 2 m + ln l. reach = right + 1 + diagonal; the diagonal is
k_length - q_length (bottom right) or 0 (top left); right is 0 for causal attention and large for none.

Descriptors, made by the host: q, o [B, Hq, Lq, D] in tiles of 64 rows, k, v [B, Hk, Lk, D] in tiles of BLOCK_N; beyond
a tensor TMA reads 0 and writes nothing. Pointers: lse [B, Hq, Lq] and statistics [2, B, Hq, Lq], m and l, both 0 for a
row that sees no key, float32 contiguous; q_lengths and k_lengths [B] int64. Numbers: ``flags``, 1 if q_lengths are
given, + 2 if k_lengths are, + 4 for bottom right; ``scale`` is c; ``section`` as in common.py.

Saved for backward: o and statistics.

One program per multiprocessor computes tiles of 128 queries of one head, one after the other. It has three warpgroups.
The last one holds the producer, one warp that starts TMA copies; the other two compute 64 rows each. K and V go through
rings of STAGES tiles, Q through one of Q_STAGES, together with the numbers that describe its tile. Every slot of a ring
has two barriers: "full" counts the bytes that arrive, "empty" the warpgroups that have finished with them. The n-th use
of a slot ends the n-th phase of each. A wait for the phase before the first succeeds at once: slots start out empty.

Blocks of keys are processed from the last to the first. Those that some row sees only in part come first, each on its
own. For the other blocks the product q k of one block and the product p v of the block before it are issued together,
and run while softmax processes the scores of the first. The warpgroups alternate in issuing, so that the softmax of one
overlaps with the products of the other.

Registers limit the tiles. A thread has 232: D / 2 for the output, BLOCK_N / 2 for the scores, BLOCK_N / 4 for the
weights; with D = 256 and BLOCK_N = 64 that is 176. To make the others suffice, a warpgroup reads its tile's numbers
from shared memory when it needs them; see also query_tile.
"""

from fastgru.kernels.attention_sm90.common import (
    BLOCK_M,
    ROWS,
    has_nonfinite,
    keep_below,
    key_blocks,
    lengths_of,
    place_of,
    post,
    posted,
    rounds_of,
    softmax_step,
    tile_of,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def rounds_here(problem):
    """The number of tiles of this program."""
    heads, blocks = problem[0] * problem[1], gl.cdiv(problem[2], BLOCK_M)
    return rounds_of(gl.program_id(0), gl.num_programs(0), heads * blocks)


@gluon.jit
def tile_at(turn, problem, BLOCK_N: gl.constexpr):
    """The position of this round's tile, and the keys that it needs: eight numbers."""
    batch, heads, queries, keys, q_lengths, k_lengths, flags, right, section = problem
    tile = tile_of(turn, gl.program_id(0), gl.num_programs(0))
    head, block = place_of(tile, batch * heads, gl.cdiv(queries, BLOCK_M), section)
    b, h = head // heads, head % heads
    q_length, k_length = lengths_of(b, q_lengths, k_lengths, flags, queries, keys)
    reach = right + 1 + gl.where(flags & 4 != 0, k_length - q_length, 0)
    needed, whole = key_blocks(block * BLOCK_M, BLOCK_M, q_length, k_length, reach, BLOCK_N)
    return b, h, block * BLOCK_M, q_length, k_length, reach, needed, whole


@gluon.jit
def fetch(desc, place, ring, full, empty, use, STAGES: gl.constexpr):
    """Starts the copy of the ``use``-th tile of a ring, once its slot is empty."""
    slot = use % STAGES
    mbarrier.wait(empty.index(slot), (use // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.nbytes_per_cta)
    tma.async_load(desc, place, full.index(slot), ring.index(slot))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, problem, rings, barriers,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: one warp that starts all copies."""
    q_ring, k_ring, v_ring, places = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    group = problem[1] // k_desc.shape[1]
    done = 0
    for turn in range(rounds_here(problem)):
        place = tile_at(turn, problem, BLOCK_N)
        b, h, i0, _, _, _, needed, _ = place
        if needed > 0:
            fetch(k_desc, [b, h // group, (needed - 1) * BLOCK_N, 0], k_ring, k_full, k_empty, done, STAGES)
        for who in gl.static_range(2):
            slot = turn % Q_STAGES * 2 + who
            mbarrier.wait(q_empty.index(slot), (turn // Q_STAGES & 1) ^ 1)
            post(places.index(slot), place)
            mbarrier.expect(q_full.index(slot), q_desc.nbytes_per_cta)
            tma.async_load(q_desc, [b, h, i0 + who * ROWS, 0], q_full.index(slot), q_ring.index(slot))
        # In the order of use, the keys one block ahead.
        for n in range(needed):
            j0 = (needed - 1 - n) * BLOCK_N
            if n < needed - 1:
                fetch(k_desc, [b, h // group, j0 - BLOCK_N, 0], k_ring, k_full, k_empty, done + 1, STAGES)
            fetch(v_desc, [b, h // group, j0, 0], v_ring, v_full, v_empty, done, STAGES)
            done += 1


@gluon.jit
def add_row_by_row(acc, p, room, v_tile, BLOCK_N: gl.constexpr):
    """acc + p v for one block of keys, where a weight of 0 also hides a non-finite value.

    For want of registers the weights are kept in shared memory, ``room`` [ROWS, BLOCK_N].
    """
    layout: gl.constexpr = acc.type.layout
    flat: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 4], [1, 0])
    room.store(p.to(room.dtype))
    gl.barrier()
    n = 0
    while n < BLOCK_N:
        weight = room.gather(gl.full([acc.shape[0], 1], n, gl.int32, layout), 1).to(gl.float32)
        row = v_tile.gather(gl.full([1, acc.shape[1]], n, gl.int32, flat), 0)
        row = gl.convert_layout(row, layout).to(gl.float32)
        acc += gl.where(weight != 0.0, weight * row, 0.0)
        n += 1
    gl.barrier()
    return acc


@gluon.jit
def query_tile(q_ring, slot, n):
    """The tile of queries [ROWS, D]. ``n``, a number of blocks of keys below 2^24, adds 0. It keeps the compiler from
    hoisting the two-word descriptors of the D / 16 parts of the tile out of the loop, into registers."""
    return q_ring.index(slot + (n >> 24)).reshape([ROWS, q_ring.shape[4]])


@gluon.jit
def consume(
    o_desc, problem, saved, scale, rings, rooms, barriers, order,
    WHO: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: the warpgroup that computes rows [64 WHO, 64 WHO + 64) of every tile."""
    D: gl.constexpr = o_desc.block_shape[3]
    dtype: gl.constexpr = o_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    row: gl.constexpr = gl.SliceLayout(1, scores)
    sum_row: gl.constexpr = gl.SliceLayout(1, sums)

    q_ring, k_ring, v_ring, places = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    lse, statistics = saved
    heads, queries = problem[1], problem[2]
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
    done = 0
    issues = 0
    for turn in range(rounds_here(problem)):
        q_slot = turn % Q_STAGES * 2 + WHO
        mbarrier.wait(q_full.index(q_slot), turn // Q_STAGES & 1)
        _, _, i0, _, k_length, reach, needed, whole = posted(places.index(q_slot))
        i = i0 + WHO * ROWS + gl.arange(0, ROWS, row)
        limit = gl.minimum(i + reach, k_length)
        top = gl.full([ROWS], float("-inf"), gl.float32, row)
        total = gl.zeros([ROWS], gl.float32, row)
        acc = gl.zeros([ROWS, D], gl.float32, sums)

        for n in range(needed - whole):
            j0 = (needed - 1 - n) * BLOCK_N
            slot = done % STAGES
            phase = done // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            k = k_ring.index(slot).reshape([BLOCK_N, D]).permute([1, 0])
            s = warpgroup_mma(query_tile(q_ring, q_slot, n), k, nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            v_tile = v_ring.index(slot).reshape([BLOCK_N, D])
            nonfinite = has_nonfinite(v_tile, BLOCK_N, D)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot))
            s = keep_below(s, limit - j0)
            p, top, total, decay = softmax_step(s, top, total, scale)
            acc *= gl.convert_layout(decay, sum_row, assert_trivial=True)[:, None]
            if nonfinite:
                acc = add_row_by_row(acc, p, rooms.index(WHO), v_tile, BLOCK_N)
            else:
                acc = warpgroup_mma(gl.convert_layout(p.to(dtype), operand, assert_trivial=True), v_tile, acc)
            mbarrier.arrive(v_empty.index(slot))
            done += 1

        if whole > 0:
            slot = done % STAGES
            mbarrier.wait(k_full.index(slot), done // STAGES & 1)
            k = k_ring.index(slot).reshape([BLOCK_N, D]).permute([1, 0])
            s = warpgroup_mma(query_tile(q_ring, q_slot, whole), k, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot))
            p, top, total, decay = softmax_step(s, top, total, scale)
            acc *= gl.convert_layout(decay, sum_row, assert_trivial=True)[:, None]
            weights = gl.convert_layout(p.to(dtype), operand, assert_trivial=True)
            for n in range(whole - 1):
                k_slot = (done + 1) % STAGES
                mbarrier.wait(k_full.index(k_slot), (done + 1) // STAGES & 1)
                # Waits until the other warpgroup has issued its products: the second one for those of this iteration,
                # the first one for those of the iteration before.
                mbarrier.wait(order.index(WHO), (issues & 1) ^ (1 - WHO))
                k = k_ring.index(k_slot).reshape([BLOCK_N, D]).permute([1, 0])
                s = warpgroup_mma(query_tile(q_ring, q_slot, n), k, nothing, use_acc=False, is_async=True)
                slot = done % STAGES
                mbarrier.wait(v_full.index(slot), done // STAGES & 1)
                v_tile = v_ring.index(slot).reshape([BLOCK_N, D])
                acc = warpgroup_mma(weights, v_tile, acc, is_async=True)
                mbarrier.arrive(order.index(1 - WHO))
                issues += 1
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(k_slot))
                p, top, total, decay = softmax_step(s, top, total, scale)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                mbarrier.arrive(v_empty.index(slot))
                acc *= gl.convert_layout(decay, sum_row, assert_trivial=True)[:, None]
                weights = gl.convert_layout(p.to(dtype), operand, assert_trivial=True)
                done += 1
            slot = done % STAGES
            mbarrier.wait(v_full.index(slot), done // STAGES & 1)
            acc = warpgroup_mma(weights, v_ring.index(slot).reshape([BLOCK_N, D]), acc)
            mbarrier.arrive(v_empty.index(slot))
            done += 1

        b, h, i0, q_length, _, _, _, _ = posted(places.index(q_slot))
        i = i0 + WHO * ROWS + gl.arange(0, ROWS, row)
        empty = (total == 0.0) | (i >= q_length)
        factor = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), sum_row, assert_trivial=True)
        out = gl.where(factor[:, None] == 0.0, 0.0, acc * factor[:, None])
        # Reuses the slot of q, which has no reader left.
        query_tile(q_ring, q_slot, 0).store(out.to(dtype))
        fence_async_shared()
        tma.async_store(o_desc, [b, h, i0 + WHO * ROWS, 0], q_ring.index(q_slot))
        # -inf: the row sees no key, or only NaN.
        reference = gl.where(empty | (top == float("-inf")), 0.0, top)
        row_lse = gl.where(empty, float("-inf"), reference * (scale * LN_2) + gl.log2(total) * LN_2)
        at = (b * heads + h).to(gl.int64) * queries + i
        gl.store(lse + at, row_lse, mask=i < queries)
        gl.store(statistics + at, reference, mask=i < queries)
        at += (problem[0] * heads).to(gl.int64) * queries
        gl.store(statistics + at, gl.where(empty, 0.0, total), mask=i < queries)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(q_slot))


@gluon.jit
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, lse, statistics, q_lengths, k_lengths, flags, right, section, scale,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [2 * Q_STAGES] + q_desc.block_shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rooms = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_N], plain)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    places = gl.allocate_shared_memory(gl.int32, [2 * Q_STAGES, 8], line)
    q_full = mbarrier.allocate_mbarrier(batch=2 * Q_STAGES)
    q_empty = mbarrier.allocate_mbarrier(batch=2 * Q_STAGES)
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    order = mbarrier.allocate_mbarrier(batch=2)
    for n in gl.static_range(2 * Q_STAGES):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=2)
        mbarrier.init(v_empty.index(n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(order.index(n), count=1)
    fence_async_shared()

    shape = q_desc.shape
    problem = (shape[0], shape[1], shape[2], k_desc.shape[2], q_lengths, k_lengths, flags, right, section)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    rings = (q_ring, k_ring, v_ring, places)
    saved = (lse, statistics)
    gl.warp_specialize(
        [
            (consume, (o_desc, problem, saved, scale, rings, rooms, barriers, order, 0, BLOCK_N, STAGES, Q_STAGES)),
            (consume, (o_desc, problem, saved, scale, rings, rooms, barriers, order, 1, BLOCK_N, STAGES, Q_STAGES)),
            (produce, (q_desc, k_desc, v_desc, problem, rings, barriers, BLOCK_N, STAGES, Q_STAGES)),
        ],
        [4, 1],
        [232, 40],
    )
