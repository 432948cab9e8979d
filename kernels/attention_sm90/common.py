"""What the attention kernels for Hopper share: which tile a program takes, which keys it needs, softmax's step.

Written in Gluon, Triton's language one level below: layouts, shared memory, barriers and warps are chosen here. It is
compiled ahead of time by tools/build_cubins.py, with the one Triton pinned there, for sm_90a. Letters as in
attention/scores.py; a tile of queries has 128 rows, 64 for each of the two warpgroups that compute.

Hidden keys meet no query: in a block of keys that some row may not see in full, a weight of 0 would still turn a NaN or
an infinity of a hidden value into NaN. Such blocks are looked through first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: Rows of a warpgroup, and of a program: one wgmma has 64.
ROWS = gl.constexpr(64)
BLOCK_M = gl.constexpr(128)


@gluon.jit
def rounds_of(program, programs, tiles):
    """How many tiles a program takes. Every other round runs backwards over the programs: tiles come longest first, and
    who took the longest of one round takes the shortest of the next."""
    full = tiles // programs
    place = gl.where(full % 2 == 0, program, programs - 1 - program)
    return full + gl.where(place < tiles % programs, 1, 0)


@gluon.jit
def tile_of(turn, program, programs):
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def place_of(tile, heads, blocks, section):
    """Head (of all sequences) and block of a tile. ``section`` heads, whose keys and values stay in the L2 cache
    together, are done before the next ones; among them the last block, which sees most keys under a causal mask, of
    every head comes first."""
    group = tile // (section * blocks)
    rest = tile % (section * blocks)
    width = gl.minimum(section, heads - group * section)
    return group * section + rest % width, blocks - 1 - rest // width


@gluon.jit
def lengths_of(b, q_lengths, k_lengths, flags, queries, keys):
    """Lengths of sequence b, kept within the tensors. Bits 0 and 1 of ``flags`` say which of them are given."""
    q_length = gl.load(q_lengths + b, mask=flags & 1 != 0, other=queries)
    k_length = gl.load(k_lengths + b, mask=flags & 2 != 0, other=keys)
    q_length = gl.minimum(gl.maximum(q_length, 0), queries).to(gl.int32)
    k_length = gl.minimum(gl.maximum(k_length, 0), keys).to(gl.int32)
    return q_length, k_length


@gluon.jit
def key_blocks(i0, rows, q_length, k_length, reach, BLOCK_N: gl.constexpr):
    """Blocks of keys that rows [i0, i0 + rows) need, and how many of the first of them every row sees in full.

    Row i sees the keys below min(k_length, i + reach).
    """
    last = gl.minimum(i0 + rows, q_length) - 1
    end = gl.maximum(gl.minimum(k_length, last + reach), 0)
    end = gl.where(i0 < q_length, end, 0)
    seen = gl.maximum(gl.minimum(end, i0 + reach), 0)
    return gl.cdiv(end, BLOCK_N), seen // BLOCK_N


@gluon.jit
def post(room, numbers):
    """Leave eight numbers for other warps in ``room`` [8], int32 in shared memory. For one warp, which then arrives at
    the barrier that they wait for."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    index = gl.arange(0, 8, layout)
    row = gl.full([8], 0, gl.int32, layout)
    for n in gl.static_range(8):
        row = gl.where(index == n, numbers[n], row)
    room.store(row)
    # Whichever of its threads arrives, all have written.
    gl.barrier()


@gluon.jit
def number(row, N: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, row.type.layout) == N, row, 0), 0)


@gluon.jit
def posted(room):
    """The eight numbers, for four warps: each thread reads all."""
    row = room.load(gl.BlockedLayout([8], [32], [4], [0]))
    return (
        number(row, 0), number(row, 1), number(row, 2), number(row, 3),
        number(row, 4), number(row, 5), number(row, 6), number(row, 7),
    )  # fmt: skip


@gluon.jit
def keep_below(s, limit):
    """Scores of the columns below each row's limit, -inf for the others.

    Of a column's number only the lowest three bits depend on the thread; the others are constants once the code is
    unrolled. Compared apart they take no register for every column, all through the kernel.
    """
    layout: gl.constexpr = s.type.layout
    parts = s.reshape([s.shape[0], s.shape[1] // 8, 8])
    inner: gl.constexpr = parts.type.layout
    row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, inner))
    high = gl.arange(0, s.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, inner)))
    low = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, inner)))
    left = gl.convert_layout(limit, row, assert_trivial=True)[:, None] - 8 * high[None, :]
    parts = gl.where(low[None, None, :] < left[:, :, None], parts, float("-inf"))
    return gl.convert_layout(parts.reshape(s.shape), layout, assert_trivial=True)


@gluon.jit
def softmax_step(s, top, total, scale):
    """Weights of a block of scores [ROWS, BLOCK_N], the new maximum and sum, and what earlier sums shrink by. ``scale``
    includes log2(e). Differences are taken before they are scaled: exact for scores of any size, which a difference of
    products, an instruction less, is not."""
    new_top = gl.maximum(top, gl.max(s, 1))
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2((s - base[:, None]) * scale)
    decay = gl.exp2((top - base) * scale)
    return p, new_top, total * decay + gl.sum(p, 1), decay


@gluon.jit
def has_nonfinite(tile, LENGTH: gl.constexpr, D: gl.constexpr):
    """Whether NaN or infinity is in a tile [LENGTH, D] of shared memory: all bits of an exponent are set."""
    across: gl.constexpr = min(32, D // 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    exponent: gl.constexpr = 0x7F80 if tile.dtype == gl.bfloat16 else 0x7C00
    # No more than 16 or 32 registers at a time.
    rows: gl.constexpr = 32 if D <= 128 else 8
    worst = gl.full([rows], 0, gl.int16, gl.SliceLayout(1, layout))
    for part in gl.static_range(LENGTH // rows):
        bits = tile.slice(rows * part, rows).load(layout).to(gl.int16, bitcast=True) & 0x7FFF
        worst = gl.maximum(worst, gl.max(bits, 1))
    return gl.max(worst, 0) >= exponent
