"""Schedules tiles, finds visible keys and computes the online-softmax step: shared by the attention kernels for Hopper.

The language is Gluon, Triton's lower level: layouts, shared memory, barriers and warps are explicit. The kernels are
compiled ahead of time for sm_90a by tools/build_cubins.py, with the one Triton pinned there. Letters as in
kernels/attention/scores.py; a tile of queries has 128 rows, 64 for each of the two warpgroups that compute.

A hidden key must not reach a query: a weight of 0 times NaN or infinity is NaN. So blocks of keys that some row does
not see in full are searched for non-finite values first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: Rows of a warpgroup, and of a program: one wgmma has 64.
ROWS = gl.constexpr(64)
BLOCK_M = gl.constexpr(128)


@gluon.jit
def rounds_of(program, programs, tiles):
    """The number of tiles of a program. Odd rounds run backwards over the programs: tiles are sorted by length, longest
    first, so that the program with the longest tile of one round gets the shortest of the next."""
    full = tiles // programs
    place = gl.where(full % 2 == 0, program, programs - 1 - program)
    return full + gl.where(place < tiles % programs, 1, 0)


@gluon.jit
def tile_of(turn, program, programs):
    """The tile of a program in a round (``turn``)."""
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def place_of(tile, heads, blocks, section):
    """Head (of all sequences) and block of a tile.

    Heads are processed in sections of ``section``, whose keys and values fit in the L2 cache. Within a section the last
    blocks of all heads, which see most keys under a causal mask, come first.
    """
    group = tile // (section * blocks)
    rest = tile % (section * blocks)
    width = gl.minimum(section, heads - group * section)
    return group * section + rest % width, blocks - 1 - rest // width


@gluon.jit
def lengths_of(b, q_lengths, k_lengths, flags, queries, keys):
    """Lengths of sequence b, clamped to the tensors. Bits 0 and 1 of ``flags`` say which of them are given."""
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
    """Stores eight numbers for other warps to ``room`` [8], int32 in shared memory.

    Called by one warp, which then arrives at the barrier that the others wait for.
    """
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    index = gl.arange(0, 8, layout)
    row = gl.full([8], 0, gl.int32, layout)
    for n in gl.static_range(8):
        row = gl.where(index == n, numbers[n], row)
    room.store(row)
    # All threads have stored before any of them arrives.
    gl.barrier()


@gluon.jit
def number(row, N: gl.constexpr):
    """The N-th number of a row of eight."""
    return gl.sum(gl.where(gl.arange(0, 8, row.type.layout) == N, row, 0), 0)


@gluon.jit
def posted(room):
    """Loads the eight numbers of ``post``, for four warps: each thread reads all."""
    row = room.load(gl.BlockedLayout([8], [32], [4], [0]))
    return (
        number(row, 0), number(row, 1), number(row, 2), number(row, 3),
        number(row, 4), number(row, 5), number(row, 6), number(row, 7),
    )  # fmt: skip


@gluon.jit
def keep_below(s, limit):
    """Scores of the columns below each row's limit, -inf for the others.

    Only the lowest three bits of a column's index depend on the thread; the others are constants in the unrolled code.
    Comparing the two parts separately saves one register per column throughout the kernel.
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
    """Weights of a block of scores [ROWS, BLOCK_N], the new maximum and sum, and the factor for earlier sums. ``scale``
    includes log2(e). Differences are taken before they are scaled: exact for scores of any size. A difference of
    products would save an instruction and is not exact."""
    new_top = gl.maximum(top, gl.max(s, 1))
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2((s - base[:, None]) * scale)
    decay = gl.exp2((top - base) * scale)
    return p, new_top, total * decay + gl.sum(p, 1), decay


@gluon.jit
def has_nonfinite(tile, LENGTH: gl.constexpr, D: gl.constexpr):
    """Whether a tile [LENGTH, D] in shared memory holds NaN or infinity: all bits of an exponent are set."""
    across: gl.constexpr = min(32, D // 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    exponent: gl.constexpr = 0x7F80 if tile.dtype == gl.bfloat16 else 0x7C00
    # In parts, which take no more than 16 or 32 registers at a time.
    rows: gl.constexpr = 32 if D <= 128 else 8
    worst = gl.full([rows], 0, gl.int16, gl.SliceLayout(1, layout))
    for part in gl.static_range(LENGTH // rows):
        bits = tile.slice(rows * part, rows).load(layout).to(gl.int16, bitcast=True) & 0x7FFF
        worst = gl.maximum(worst, gl.max(bits, 1))
    return gl.max(worst, 0) >= exponent
