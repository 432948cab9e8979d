"""The backward kernels of attention for Hopper, as far as they can be tried without one: as test_attention_gluon.py."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import gluon_emulator as emulator
import pytest
import torch
import torch.nn.functional as F
from test_attention_gluon import BUILD, VARIANTS, exact, pinned, problem, scalars
from test_attention_gluon import attention as run_forward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru
from fastgru import testing
from fastgru.backends import gluon as backend
from fastgru.backends import registry
from fastgru.ops.attention import api as attention
from fastgru.ops.attention import gluon
from fastgru.ops.attention import reference as reference_attention
from fastgru.ops.attention import triton as triton_attention
from fastgru.ops.attention.arguments import Attention
from fastgru.ops.attention.schema import ATTENTION_OPS

SOURCES = ("attention_sm90.common", "attention_sm90.backward")


@pytest.fixture(scope="module")
def kernels() -> Any:
    return emulator.emulated(*SOURCES)


def gradients(
    a: Attention, kernels: Any, d_output: Tensor | None, d_lse: Tensor | None, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, by the kernels' source, launched as the backend launches it."""
    return run(a, kernels, d_output, d_lse, **how).finish(a)


def bits(*arguments: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same, that of query before it is rounded: in what order it was added up shows."""
    call = run(*arguments, **how)
    return call.d_query, *call.gradients[1:]


def run(
    a: Attention,
    kernels: Any,
    d_output: Tensor | None,
    d_lse: Tensor | None,
    programs: int = 3,
    seed: int = 0,
    saved: tuple[Tensor, Tensor] | None = None,
) -> gluon.Backward:
    """``saved``: output and statistics, if not the exact ones."""
    if saved is None:
        output, _, statistics = exact(a)
        saved = output.to(a.query.dtype), statistics.float()
    variant = VARIANTS[gluon._name(a, "backward")]
    call = gluon.Backward(a, *saved, d_output, d_lse, variant.constants, programs)
    for t in (*call.gradients, call.rows[0]["stats"], call.rows[0]["plan"]):
        t.fill_(math.nan if t.is_floating_point() else -7)
    rows = VARIANTS[gluon._name(a, "backward_rows")]
    emulator.launch_variant(rows, kernels.attention_backward_rows, call.rows, call.row_programs)
    emulator.launch_variant(variant, kernels.attention_backward, call.main, call.programs, seed=seed, together=True)
    return call


def seen(a: Attention) -> Tensor:
    """Which query sees which key, [B, 1, Lq, Lk]."""
    (B, _, Lq, _), Lk = a.query.shape, a.key.shape[2]
    q_lengths = torch.full((B,), Lq) if a.q_lengths is None else a.q_lengths
    k_lengths = torch.full((B,), Lk) if a.k_lengths is None else a.k_lengths
    diagonal = (k_lengths - q_lengths if a.bottom_right else torch.zeros(B)).view(-1, 1, 1)
    i, j = torch.arange(Lq)[:, None], torch.arange(Lk)
    visible = (i < q_lengths.view(-1, 1, 1)) & (j < k_lengths.view(-1, 1, 1))
    if a.window_right >= 0:
        visible &= j <= i + diagonal + a.window_right
    return visible[:, None]


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, whole blocks": {"Lq": 256, "Lk": 256},
    "one of each": {"B": 1, "Hq": 1, "Hk": 1, "Lq": 1, "Lk": 1},
    "one query": {"Lq": 1, "Lk": 700, "B": 1, "D": 128},
    "causal": {"right": 0, "Lq": 300, "Lk": 300},
    "causal, more keys": {"right": 0, "Lq": 130, "Lk": 400, "D": 128},
    "causal, more queries": {"right": 0, "Lq": 300, "Lk": 70},
    "causal, top left": {"right": 0, "bottom_right": False, "Lq": 70, "Lk": 300},
    "to the right": {"right": 100, "Lq": 200, "Lk": 400},
    "lengths": {"q_lengths": [200, 0], "k_lengths": [0, 131]},
    "lengths, causal": {"q_lengths": [37, 201], "k_lengths": [259, 130], "right": 0, "D": 128},
    "128 columns": {"D": 128, "Lq": 260, "Lk": 520, "B": 1},
    "float16": {"dtype": torch.float16, "D": 128, "k_lengths": [300, 17]},
    "groups, heads last": {"heads_last": True, "right": 0, "Hq": 6, "Hk": 2, "B": 1},
    "256 columns": {"D": 256, "Lq": 260, "Lk": 200, "B": 1},
    "256 columns, one query": {"D": 256, "Lq": 1, "Lk": 130, "B": 1},
    "256 columns, causal": {"D": 256, "right": 0, "Lq": 130, "Lk": 200, "Hq": 4, "Hk": 2, "heads_last": True},
    "256 columns, top left": {"D": 256, "right": 3, "bottom_right": False, "Lq": 70, "Lk": 300, "B": 1},
    "256 columns, lengths": {"D": 256, "right": 0, "q_lengths": [37, 201], "k_lengths": [259, 0]},
    "256 columns, float16": {"D": 256, "dtype": torch.float16, "k_lengths": [300, 17]},
}


@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name: str, kernels: Any) -> None:
    torch.manual_seed(list(CASES).index(name))
    a = problem(CASES[name])
    d_output = torch.randn(a.query.shape).to(a.query.dtype)
    d_lse = torch.randn(a.query.shape[:3])
    output, _, statistics = exact(a)
    double = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in a]
    want = reference_attention.attention_backward(d_output.double(), d_lse.double(), *double, output, statistics, False)
    found = gradients(a, kernels, d_output, d_lse)

    def usual(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in (a.query, a.key, a.value)]
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(*inputs, attn_mask=seen(a), scale=a.scale, enable_gqa=True)
        return torch.autograd.grad(out, inputs, d_output.to(dtype))

    for ours, exactly, one, other in zip(found, want, usual(a.query.dtype), usual(torch.float64), strict=False):
        # Torch's error is taken against its own operator: what hides keys differs. Three times, as for all gradients of
        # attention.
        torch_error, largest = (one - other).abs().max().item(), exactly.abs().max().item()
        assert not ours.isnan().any()
        assert (ours - exactly).abs().max() <= testing.error_limit(torch_error, largest, a.query.dtype, multiple=3)
    nothing = ~seen(a).any(3, keepdim=True)
    assert not (found[0] * nothing).any() and not (found[2] * ~seen(a).any(2).unsqueeze(3)).any()


@pytest.fixture(scope="module")
def forward() -> Any:
    return emulator.emulated("attention_sm90.common", "attention_sm90.forward")


def whole(low: int, high: int, like: Tensor) -> Tensor:
    """Whole numbers, of which float32 holds products and sums as they are."""
    return torch.randint(low, high + 1, like.shape).to(like.dtype)


@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("largest", [4e4, 4e6])
def test_large_scores(D: int, dtype: torch.dtype, largest: float, kernels: Any, forward: Any) -> None:
    """And near their maximum some that count: the weights of the forward pass and those of the way back."""
    a = problem({"B": 1, "right": 0, "Lq": 130, "Lk": 140, "D": D, "dtype": dtype})
    size = round((largest / D) ** 0.5)
    a = a._replace(query=size + whole(0, 1, a.query), key=size + whole(0, 1, a.key), scale=1.0)
    a.key[:, :, ::3] -= 5
    d_output, d_lse = torch.randn(a.query.shape).to(dtype), torch.randn(a.query.shape[:3])
    exactly, exact_lse, exact_statistics = exact(a)
    double = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in a]
    grads = (d_output.double(), d_lse.double())
    wants = reference_attention.attention_backward(*grads, *double, exactly, exact_statistics, False)
    output, lse, statistics = run_forward(a, forward.attention_forward, programs=3)
    assert 0.8 * largest < lse.min() and lse.max() < 1.2 * largest
    torch.testing.assert_close(statistics.double(), exact_statistics, rtol=1e-5, atol=0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)
    assert (output - exactly).abs().max() < 0.02
    found = gradients(a, kernels, d_output, d_lse, saved=(output, statistics))
    for got, want in zip(found, wants, strict=False):
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("D", [64, 128, 256])
def test_equal_scores(D: int, kernels: Any, forward: Any) -> None:
    """Of 1e12 and more: every weight is one of as many as there are keys."""
    a = problem({"B": 1, "Lq": 70, "Lk": 150, "D": D})
    a = a._replace(**{name: torch.full_like(getattr(a, name), 133120.0) for name in ("query", "key", "value")})
    output, lse, statistics = run_forward(a, forward.attention_forward, programs=3)
    assert (output == 133120).all() and (statistics[1] == 150).all() and lse.isfinite().all()
    found = gradients(a, kernels, torch.ones_like(a.query), None, saved=(output, statistics))
    # Two query heads share the key head.
    torch.testing.assert_close(found[2], torch.full_like(found[2], 2 * 70 / 150), rtol=0.01, atol=0)
    assert not found[0].any() and not found[1].any()


@pytest.mark.skipif(backend._available() is not None, reason="needs a Hopper GPU and the kernels of a CUDA wheel")
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_emulated(name: str, kernels: Any) -> None:
    torch.manual_seed(0)
    a = problem(CASES[name])
    d_output, d_lse = torch.randn(a.query.shape).to(a.query.dtype), torch.randn(a.query.shape[:3])
    want = gradients(a, kernels, d_output, d_lse)
    given = [t.cuda() if isinstance(t, Tensor) else t for t in a]
    with fastgru.use_backend("gluon"):
        output, _, statistics = ATTENTION_OPS["gluon"].forward(*given)
        first = None
        for _ in range(20):
            got = ATTENTION_OPS["gluon"].backward(d_output.cuda(), d_lse.cuda(), *given, output, statistics, False)[:3]
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=0.02, atol=0.02)
            first = first or got
            assert all(torch.equal(*pair) for pair in zip(got, first, strict=True))


def test_without_gradients_of_results(kernels: Any) -> None:
    a = problem({"B": 1, "Lq": 70, "Lk": 90})
    assert not any(t.any() for t in gradients(a, kernels, None, None))
    d_lse = torch.ones(1).expand(1, 2, 70)
    d_query, _, d_value = gradients(a, kernels, None, d_lse)
    assert d_query.any() and not d_value.any()


@pytest.mark.parametrize(
    "D, lengths",
    [
        (64, (300, 300, 0, True)),
        (128, (500, 400, 0, False)),
        (64, (700, 150, 300, True)),
        (128, (70, 900, -1, True)),
        (256, (250, 330, 0, True)),
    ],
)
def test_every_sum_is_added_up_once_in_an_order_without_circles(D: int, lengths: Any, kernels: Any) -> None:
    """The plan of all programs, and who waits for whom, without the arithmetic."""
    Lq, Lk, right, bottom_right = lengths
    case = {"B": 2, "Hq": 4, "Hk": 2, "Lq": Lq, "Lk": Lk, "D": D, "right": right, "bottom_right": bottom_right}
    a = problem({**case, "q_lengths": [Lq, Lq - 60], "k_lengths": [Lk, Lk // 3]})
    sizes = VARIANTS[gluon._name(a, "backward")].constants
    block = (sizes["BLOCK_M"], sizes["BLOCK_N"])
    name = gluon._name(a, "backward_rows")
    blocks = -(-Lk // block[1])
    # Query blocks that see something of a key block, of each sequence.
    visible = F.pad(seen(a)[:, 0].float(), (0, -Lk % block[1], 0, -Lq % block[0]))
    needed = F.max_pool2d(visible[:, None], block)[:, 0] > 0
    for programs, section in ((1, 4), (3, 1), (7, 2), (200, 3)):
        call = gluon.Backward(a, a.query, torch.zeros(2, 2, 4, Lq), None, None, sizes, programs)
        call.rows[1]["section"] = section
        emulator.launch_variant(VARIANTS[name], kernels.attention_backward_rows, call.rows, call.row_programs)
        plan = call.rows[0]["plan"].view(-1, call.programs, 16)
        assert (plan[-1, :, kernels.HEAD] == -1).all() and (plan[0, :, kernels.HEAD] >= 0).all()
        taken = [tuple(one[:2].tolist()) for one in plan.view(-1, 16) if one[0] >= 0]
        assert sorted(taken) == list(itertools.product(range(4), range(blocks)))
        events: list[list[tuple[int, int, int, int]]] = [[] for _ in range(call.programs)]
        for turn, program in itertools.product(range(len(plan)), range(call.programs)):
            one = scalars(*plan[turn, program].tolist())
            if one[kernels.HEAD] < 0:
                continue
            fields = [one[n] for n in (kernels.FIRST, kernels.COUNT, kernels.START)]
            spacing = kernels.starts_of(one[kernels.Q_LENGTH], emulator.Scalar(Lk), *block)
            for member, step in itertools.product(range(2), scalars(*range(one[kernels.COUNT]))):
                i = kernels.queries_at(step, one[kernels.TURN], *fields)
                before = kernels.added_before(
                    i, one[kernels.BLOCK], one[kernels.TURN], one[kernels.MATES], one[kernels.MATES_END], *spacing,
                    one[kernels.K_LENGTH], one[kernels.REACH], *block,
                )  # fmt: skip
                events[program].append((one[kernels.HEAD] * 2 + member, int(i), one[kernels.BLOCK], int(before)))
        found = [event[:3] for some in events for event in some]
        want = [
            (head, i, j) for head in range(8) for i, j in needed[head // 4].nonzero().tolist()
        ]  # fmt: skip
        assert sorted(found) == sorted(want)
        counters: dict[tuple[int, int], int] = {}
        while any(events):
            ready = [some for some in events if some and counters.get(some[0][:2], 0) == some[0][3]]
            assert ready, "the programs wait in a circle"
            for some in ready:
                head, i, _, before = some.pop(0)
                counters[head, i] = before + 1


@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_same_bits_in_any_order(D: int, kernels: Any) -> None:
    """However the programs, their partitions and the copies take turns."""
    a = problem({"B": 1, "right": 0, "Lq": 400, "Lk": 600, "D": D} if D < 256 else {"B": 1, "right": 0, "D": D})
    d_output = torch.randn(a.query.shape).to(a.query.dtype)
    first = bits(a, kernels, d_output, None, programs=4)
    for seed in range(1, 7):
        other = bits(a, kernels, d_output, None, programs=4, seed=seed)
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("odd, D", [(math.nan, 64), (math.inf, 64), (-math.inf, 64), (math.nan, 256), (-math.inf, 256)])
def test_hidden_nan_and_infinity(odd: float, D: int, kernels: Any) -> None:
    """In padding, and of queries and keys that a causal mask hides from each other."""
    a = problem({"right": 0, "k_lengths": [290, 160], "q_lengths": [201, 150], "Lq": 201, "Lk": 300, "D": D})
    d_output = torch.randn(a.query.shape).to(a.query.dtype)
    usual = gradients(a, kernels, d_output, None)
    bad = a._replace(query=a.query.clone(), key=a.key.clone(), value=a.value.clone())
    bad.key[0, :, 290:], bad.value[0, :, 290:] = odd, odd
    bad.key[1, :, 150:], bad.value[1, :, 155:] = odd, odd
    bad.query[1, :, 150:], d_output[1, :, 150:] = odd, odd
    d_output[1, :, 3, 5] = odd
    d_query, d_key, d_value = (t.clone() for t in gradients(bad, kernels, d_output, None))
    # In the second sequence the last 10 queries see some of the odd keys, and query 3 the keys 0 to 13; these are hit,
    # and so are the keys that these queries see.
    assert d_query[1, :, 140:150].isnan().all() and d_query[1, :, 3].isnan().all()
    assert d_key[1, :, :14].isnan().all() and d_value[1, :, :14, 5].isnan().all()
    assert torch.equal(d_query[0], usual[0][0]) and torch.equal(d_key[0], usual[1][0])
    assert torch.equal(d_value[0], usual[2][0])
    keep = [*range(3), *range(4, 140)]
    assert torch.equal(d_query[1][:, keep], usual[0][1][:, keep]) and not d_query[1, :, 150:].any()
    # Queries up to 139 see keys up to 149, but only through them are the keys below 150 free of the last 10 queries.
    assert not d_key[1, :, 160:].any() and not d_value[1, :, 160:].any()


@pytest.mark.parametrize("D", [128, 256])
def test_a_hidden_query_does_not_reach_keys(D: int, kernels: Any) -> None:
    a = problem({"B": 1, "right": 0, "bottom_right": False, "Lq": 201, "Lk": 300, "D": D})
    d_output = torch.randn(a.query.shape).to(a.query.dtype)
    usual = gradients(a, kernels, d_output, None)
    bad = a._replace(query=a.query.clone())
    bad.query[:, :, 100], d_output[:, :, 90] = math.nan, math.inf
    d_query, d_key, d_value = gradients(bad, kernels, d_output, None)
    rows = [i for i in range(201) if i not in (90, 100)]
    assert torch.equal(d_query[:, :, rows], usual[0][:, :, rows]) and d_query[:, :, [90, 100]].isnan().all()
    for got, want in ((d_key, usual[1]), (d_value, usual[2])):
        assert torch.equal(got[:, :, 101:], want[:, :, 101:]) and got[:, :, :91].isnan().all()


INNER = "\n" + 12 * " "
WRITER = "\n" + 16 * " "
PART = "\n" + 20 * " "
POLL = f'\n{24 * " "}gl.atomic_poll(counter, before, sem="acquire", scope="gpu")'

#: What, in the kernel, a mistake would look like: each is noticed.
MISTAKES = {
    "phase of q": (
        "mbarrier.wait(q_full.index(slot), phase)\n            mb",
        "mbarrier.wait(q_full.index(slot), 0)\n            mb",
    ),
    "no wait for do": (f"{INNER}mbarrier.wait(do_full.index(slot), phase)", ""),
    "no wait for the keys": ("\n        mbarrier.wait(keys_full, gl.load(at + TURN) & 1)", ""),
    "no wait for ds": (f"{INNER}mbarrier.wait(ds_full.index(2 * ds_slot + 1 - WHO), ds_phase)", ""),
    "ds overwritten": (f"{INNER}mbarrier.wait(ds_empty.index(ds_slot), ds_phase ^ 1)", ""),
    "no fence for ds": (f"own.store(slopes){INNER}fence_async_shared()", "own.store(slopes)"),
    "no fence for dq": (f".store(dq){INNER}fence_async_shared()", ".store(dq)"),
    "q released early": (
        f"{INNER}dk, slopes = warpgroup_mma_wait(0, deps=[dk, slopes])",
        f"{INNER}mbarrier.arrive(q_empty.index(slot)){INNER}dk, slopes = warpgroup_mma_wait(0, deps=[dk, slopes])",
    ),
    "k overwritten": ("if done > 0:", "if done < 0:"),
    "dq overwritten": (f"{INNER}mbarrier.wait(dq_empty.index(dq_slot), (done // DQ_STAGES & 1) ^ 1)", ""),
    "dq released early": (f"{PART}tma.store_wait(0)\n", "\n"),
    "out of order": (POLL, ""),
    "read without order": ('before, sem="acquire"', 'before, sem="relaxed"'),
    "raised without order": ('1, sem="release"', '1, sem="relaxed"'),
    "raised early": (f"{WRITER}tma.store_wait(0, read_only=False)", ""),
    "not raised": (f'{WRITER}gl.atomic_add(counter, 1, sem="release", scope="gpu")', ""),
    "no proxy fence": (f"\n{24 * ' '}fence_async_global()", ""),
    "wrong turn": ("middle - 1 - block, middle", "middle - block, middle"),
    "one warpgroup counted": ("init(ds_empty.index(n), count=2)", "init(ds_empty.index(n), count=1)"),
    "keys released early": ("mbarrier.init(keys.index(1), count=2)", "mbarrier.init(keys.index(1), count=1)"),
    "mask off by one": ("j + 1 - gl.load", "j - gl.load"),
    "blocks not masked": ("part = (i <", "part = (i + 9 <"),
}


WAIT_ALL = "dk, dq, slopes = warpgroup_mma_wait(0, deps=[dk, dq, slopes])"
FENCED_STORE = ".reshape([64, 64]).store(dq)"

#: And in what is the kernel's for 256 columns alone.
MISTAKES_OF_COLUMNS = {
    "phase of q": ("mbarrier.wait(q_full.index(slot), phase)", "mbarrier.wait(q_full.index(slot), 0)"),
    "no wait for do": (f"{INNER}mbarrier.wait(do_full.index(slot), phase)", ""),
    "no wait for the keys": ("\n        mbarrier.wait(keys_full, gl.load(at + TURN) & 1)", ""),
    "scores not awaited": ("warpgroup_mma_wait(2, deps=[s])", "warpgroup_mma_wait(3, deps=[s])"),
    "dp not awaited": ("warpgroup_mma_wait(1, deps=[dp])", "warpgroup_mma_wait(2, deps=[dp])"),
    "no wait for the other's ds": (f"{INNER}mbarrier.wait(ds_full.index(2 * ds_slot + 1 - WHO), ds_phase)", ""),
    "ds overwritten": (f"{INNER}mbarrier.wait(ds_empty.index(ds_slot), ds_phase ^ 1)", ""),
    "ds released early": (
        f"{WAIT_ALL}{INNER}mbarrier.arrive(ds_empty.index(ds_slot))",
        f"mbarrier.arrive(ds_empty.index(ds_slot)){INNER}{WAIT_ALL}",
    ),
    "no fence for ds": (f".store(slopes){INNER}fence_async_shared()", ".store(slopes)"),
    "no fence for dq": (f"{FENCED_STORE}{INNER}fence_async_shared()", FENCED_STORE),
    "dq over q": ("dq_rings[0].index(2 * slot + WHO)", "dq_rings[1].index(2 * slot + WHO)"),
    "dq over the other's": ("dq_rings[0].index(2 * slot + WHO)", "dq_rings[0].index(2 * slot + 1 - WHO)"),
    "wrong room told": ("dq_full.index(4 * slot + WHO)", "dq_full.index(4 * slot + 2 + WHO)"),
    "gradients overwritten": ("tma.store_wait(0)\n        mbarrier.arrive(keys_empty)", "mbarrier.arrive(keys_empty)"),
    "mask off by half a block": ("j0, i * BLOCK_M + OWN)", "j0, i * BLOCK_M)"),
    "blocks not masked": ("part = (i <", "part = (i + 9 <"),
}
#: In what the kernel has for all columns, and matters otherwise for these.
MISTAKES_OF_ALL = {name: MISTAKES[name] for name in ("dq released early", "out of order")} | {
    "q not released": ("dq_empties = (do_empty, q_empty)", "dq_empties = (do_empty, do_empty)"),
    "released twice": ("init(do_empty.index(n), count=BLOCK_N // ROWS)", "init(do_empty.index(n), count=2)"),
}


@pytest.fixture(scope="module")
def trial(request: Any, kernels: Any) -> Any:
    torch.manual_seed(1)
    Lq, Lk = (450, 440) if request.param == 128 else (290, 250)
    case = {"B": 1, "Hq": 1, "right": 0, "bottom_right": False, "Lq": Lq, "Lk": Lk, "D": request.param}
    a = problem(case)
    d_output = torch.randn(a.query.shape).to(a.query.dtype)
    return a, d_output, bits(a, kernels, d_output, None, programs=3)


def unnoticed(trial: Any, wrong: Any) -> bool:
    a, d_output, want = trial
    for seed in range(24):
        try:
            found = bits(a, wrong, d_output, None, programs=3, seed=seed)
        except emulator.KernelError:
            return False
        if not all(
            torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)) for one, other in zip(found, want, strict=True)
        ):
            return False
    return True


@pytest.mark.parametrize(
    "D, change",
    [
        (128, (f"make_finite(do, BLOCK_M, D){WRITER}fence_async_shared()", "make_finite(do, BLOCK_M, D)")),
        (256, (f"{WRITER}fence_async_shared(){WRITER}gl.barrier()", f"{WRITER}gl.barrier()")),
        (256, ("\n        mbarrier.wait(keys_clean, gl.load(at + TURN) & 1)", "")),
        (256, (f"make_finite(v, ROWS, COLUMNS)\n{12 * ' '}fence_async_shared()", "make_finite(v, ROWS, COLUMNS)")),
    ],
)
def test_careless_cleaning_is_noticed(D: int, change: tuple[str, str], kernels: Any) -> None:
    a = problem({"B": 1, "Hq": 1, "right": 0, "Lq": 70, "Lk": 70, "D": D, "k_lengths": [60]})
    a.query[:, :, 30], a.key[:, :, 62], a.value[:, :, 63] = math.nan, math.inf, math.nan
    d_output = torch.ones_like(a.query)
    trial = a, d_output, bits(a, kernels, d_output, None)
    after = "def consume_columns(" if D == 256 else ""
    assert unnoticed(trial, kernels)
    assert not unnoticed(trial, emulator.emulated(*SOURCES, changes=dict([change]), after=after))


@pytest.mark.parametrize("trial", [128], indirect=True)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name: str, trial: Any) -> None:
    """In the kernel's barriers, fences, order and bounds: the tests above would not pass with any of them."""
    assert not unnoticed(trial, emulator.emulated(*SOURCES, changes=dict([MISTAKES[name]])))


@pytest.mark.parametrize("trial", [256], indirect=True)
@pytest.mark.parametrize("name", [*MISTAKES_OF_COLUMNS, *MISTAKES_OF_ALL])
def test_mistakes_with_256_columns_are_noticed(name: str, trial: Any) -> None:
    after = "def consume_columns(" if name in MISTAKES_OF_COLUMNS else ""
    change = dict([(MISTAKES_OF_COLUMNS | MISTAKES_OF_ALL)[name]])
    assert not unnoticed(trial, emulator.emulated(*SOURCES, changes=change, after=after))


@pinned
@pytest.mark.parametrize(
    "name",
    [
        "attention_backward_bfloat16_64", "attention_backward_bfloat16_128", "attention_backward_bfloat16_256",
        "attention_backward_rows_bfloat16_64", "attention_backward_rows_float16_128",
        "attention_backward_rows_float16_256",
    ],
)  # fmt: skip
def test_compiles_to_what_is_meant(name: str, tmp_path: Path) -> None:
    kernel = BUILD["compiled"](VARIANTS[name])
    code = BUILD["disassembled"](kernel.asm["cubin"], tmp_path)
    assert BUILD["faults"](kernel, code, VARIANTS[name].instructions) == []
    if "rows" not in name:
        refused = BUILD["faults"](kernel, code.replace("UTMAREDG", "RED"), VARIANTS[name].instructions)
        assert any("UTMAREDG" in one for one in refused)
        refused = BUILD["faults"](kernel, code + 64 * " WARPGROUP.ARRIVE ;", VARIANTS[name].instructions)
        assert any("products" in one for one in refused)
        maps = BUILD["described"](VARIANTS[name], kernel)["maps"]
        # Copies of 128 bytes across: 64 columns of bfloat16 (9), 32 of float32 (7).
        assert maps["k_desc"] == {"box": [1, 1, 64, 64], "swizzle": 3, "element": 9}
        assert maps["dq_desc"] == {"box": [1, 1, 64, 32], "swizzle": 3, "element": 7}


def test_what_runs_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*arguments: Any) -> tuple[Tensor, ...]:
        raise RuntimeError("the kernel does not start: too many blocks")

    def theirs(*arguments: Any) -> str:
        return "triton"

    a = problem({"Lq": 3, "Lk": 4})
    arguments = (None, None, *a, a.query, torch.zeros(2, 2, 2, 3), False)
    monkeypatch.setattr(gluon, "manifest", lambda: dict.fromkeys(VARIANTS))
    monkeypatch.setattr(gluon, "_broken", [])
    monkeypatch.setattr(triton_attention, "attention_backward", theirs)
    monkeypatch.setattr(gluon, "_launch_backward", lambda *arguments: (a.query, a.key, a.value))
    assert gluon.attention_backward(*arguments)[1] is a.key
    monkeypatch.setattr(gluon, "_launch_backward", launch)
    with fastgru.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match="too many blocks"):
            assert gluon.attention_backward(*arguments) == "triton"
        assert gluon.attention_backward(*arguments) == "triton"
    monkeypatch.setattr(registry._process, "name", "gluon")
    with pytest.raises(fastgru.BackendUnavailable, match="backward pass: the kernel does not start"):
        gluon.attention_backward(*arguments)
    arguments = (None, None, *a._replace(softcap=1.0), *arguments[-3:])
    with pytest.raises(fastgru.BackendUnavailable, match="backward pass: it has no kernel with softcap"):
        gluon.attention_backward(*arguments)
    monkeypatch.setattr(registry._process, "name", "auto")
    monkeypatch.setattr(gluon, "_broken", [])
    assert gluon.attention_backward(*arguments) == "triton"


def test_explain_tells_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "manifest", lambda: dict.fromkeys(VARIANTS))
    everywhere = registry.Backend("gluon", ("cpu",), 65, lambda: None, lambda *_: None)
    monkeypatch.setitem(registry._backends, "gluon", everywhere)
    with fastgru.use_backend("auto"):
        found = fastgru.explain(dtype=torch.bfloat16)
    assert "forward and backward with D = 64, 128, 256" in found
    assert "backward with D = none" in backend.covers(torch.float32)
    # Whatever has a kernel forward has those of the way back.
    for name in VARIANTS:
        _, _, rest = name.partition("attention_forward_")
        assert not rest or {f"attention_backward_{rest}", f"attention_backward_rows_{rest}"} <= VARIANTS.keys()


@pytest.mark.parametrize("directions", list(itertools.product((False, True), repeat=2)))
def test_auto_chooses_each_direction(directions: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, priority in (("gluon", 999), ("triton", 998)):
        everywhere = registry.Backend(name, ("cpu",), priority, lambda: None, lambda *_: None)
        monkeypatch.setitem(registry._backends, name, everywhere)
    how = registry.Implementation(wins=lambda device, dtype, problem: problem is not None and directions[problem[1]])
    monkeypatch.setitem(registry._implementations, ("attention", "gluon"), how)
    with fastgru.use_backend("auto"):
        ops = attention._choose(tuple(problem({"Lq": 3, "Lk": 4})))
    names = ["gluon" if chosen else "triton" for chosen in directions]
    assert list(ops) == [ATTENTION_OPS[names[0]].forward, ATTENTION_OPS[names[1]].backward]
