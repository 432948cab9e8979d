"""Attention beyond its numbers: what hides, what repeats, what compiles, what raises; SDPA's and flash-attn's names."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastgru
from fastgru import flash_attn, testing
from fastgru.backends import registry
from fastgru.ops.attention.schema import ATTENTION_OPS

NAN = float("nan")


def feature(name: str, detail: str = "") -> pytest.MarkDecorator:
    """A line of docs/attention-features.md."""
    return pytest.mark.feature("Attention", name, detail)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def qkv(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value of sizes B, H, Lq, Lk, D, as far as they are given."""
    batch, heads, queries, keys, columns = (*sizes, *(2, 3, 5, 7, 4)[len(sizes) :])
    return [draw(batch, heads, length, columns, dtype=dtype) for length in (queries, keys, keys)]


def with_gradients(tensors: list[Tensor], seed: Tensor | None = None, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    output = fastgru.flash_attention(*tensors, **options)
    return [output, *torch.autograd.grad(output, tensors, torch.ones_like(output) if seed is None else seed)]


# ---- what is hidden ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(2, 7), (70, 101)], ids=str)
@pytest.mark.parametrize("how", ["k_lengths", "mask", "float mask"])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_hidden_keys_have_no_influence(
    engine: str, how: str, lengths: tuple[int, int], bad: float, dtype: torch.dtype
) -> None:
    tensors = qkv(2, 2, *lengths, dtype=dtype)
    seen = lengths[1] - 3
    options: dict[str, Any] = {"k_lengths": torch.tensor([seen, seen])}
    if how != "k_lengths":
        mask = (torch.arange(lengths[1]) < seen).expand(lengths)
        options = {"attn_mask": mask if how == "mask" else torch.zeros(lengths).masked_fill(~mask, -torch.inf)}
    want = with_gradients(tensors, **options)
    for t in tensors[1:]:
        t.data[:, :, seen:] = bad
    got = with_gradients(tensors, **options)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    assert not want[2][:, :, seen:].any() and not want[3][:, :, seen:].any()


@pytest.mark.parametrize("how", ["k_lengths", "q_lengths", "mask", "causal"])
def test_hidden_nan_has_no_influence_on_second_derivatives(backend: str, how: str) -> None:
    options: dict[str, Any] = {
        "k_lengths": {"k_lengths": torch.tensor([4, 0])},
        "q_lengths": {"q_lengths": torch.tensor([4, 0])},
        "mask": {"attn_mask": (torch.arange(7) < 4).expand(5, 7)},
        "causal": {"causal": True, "causal_align": "top_left"},
    }[how]
    results = []
    for bad in (1.0, NAN):
        torch.manual_seed(0)
        tensors = qkv(dtype=torch.float64)
        seed = torch.randn(2, 3, 5, 4, dtype=torch.float64)
        for t in (tensors[0], seed) if how == "q_lengths" else tensors[1:]:
            t.data[:, :, (4 if how != "causal" else 5) :] = bad
            if how in ("q_lengths", "k_lengths"):
                t.data[1] = bad
        grads = torch.autograd.grad(fastgru.flash_attention(*tensors, **options), tensors, seed, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.sin().sum() for g in grads), tensors)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [4, 70])
def test_a_later_nan_does_not_reach_an_earlier_query(engine: str, length: int) -> None:
    tensors = qkv(2, 3, length, length)
    want = fastgru.flash_attention(*tensors, causal=True)
    for t in tensors:
        t.data[:, :, -1] = NAN
    got = fastgru.flash_attention(*tensors, causal=True)
    assert torch.equal(want[:, :, :-1], got[:, :, :-1])
    assert got[:, :, -1].isnan().all()


@pytest.mark.parametrize("lengths", [(3, 7), (70, 101)], ids=str)
def test_padded_queries_have_no_influence(engine: str, lengths: tuple[int, int]) -> None:
    tensors = qkv(2, 2, *lengths)
    options = {"q_lengths": torch.tensor([lengths[0] - 2, 0])}
    want = with_gradients(tensors, **options)
    tensors[0].data[0, :, lengths[0] - 2 :] = NAN
    seed = torch.ones_like(want[0])
    seed[0, :, lengths[0] - 2 :] = NAN
    seed[1] = NAN
    for a, b in zip(want, with_gradients(tensors, seed, **options), strict=True):
        assert torch.equal(a, b)
    assert not want[0][1].any() and not want[1][1].any() and not want[2][1].any()


@pytest.mark.parametrize("lengths", [(2, 6), (66, 60)], ids=str)
def test_a_visible_nan_is_not_hidden(engine: str, lengths: tuple[int, int]) -> None:
    for which in range(3):
        tensors = qkv(1, 1, *lengths)
        tensors[which].data[0, 0, 1, 2] = NAN
        output = fastgru.flash_attention(*tensors, k_lengths=torch.tensor([5]))
        wrong = output.isnan()
        assert wrong[0, 0, 1].any() and wrong.any(-1).all() == (which > 0)


@feature("fully masked row gives 0")
@pytest.mark.parametrize("lengths", [(4, 3), (70, 60)], ids=str)
def test_a_row_without_keys(engine: str, lengths: tuple[int, int]) -> None:
    tensors = qkv(1, 2, *lengths)
    mask = torch.ones(lengths, dtype=torch.bool)
    mask[1] = False
    for options in ({"attn_mask": mask}, {"attn_mask": torch.zeros(lengths).masked_fill(~mask, -torch.inf)}):
        output, lse = fastgru.flash_attention(*tensors, **options, return_lse=True)
        grads = torch.autograd.grad(output.sum() + lse[:, :, 0].sum(), tensors)
        assert not output[:, :, 1].any() and (lse[:, :, 1] == -torch.inf).all()
        assert not grads[0][:, :, 1].any()
        assert not any(t.isnan().any() for t in (output, *grads))
    # More queries than keys at the bottom right: the first ones see nothing.
    output = fastgru.flash_attention(*tensors, causal=True)
    assert not output[:, :, : lengths[0] - lengths[1]].any() and output[:, :, lengths[0] - lengths[1] :].all()


# ---- scores of any size ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1100, 150])
@pytest.mark.parametrize("scores", ["near zero", "far below", "climbing", "falling", "one late"])
def test_scores_far_from_zero_and_from_each_other(engine: str, scores: str, keys: int, dtype: torch.dtype) -> None:
    query, key, value = qkv(1, 2, 13, keys, 32, dtype=dtype)
    step = torch.arange(keys) // 40 * 8.0
    late = torch.where(torch.arange(keys) == keys - 30, 90.0, 0.0)
    far = torch.full((keys,), -200.0)
    query.data[..., 0] = 32**0.5
    key.data[..., 0] = {"near zero": 0 * step, "far below": far, "climbing": step, "falling": -step, "one late": late}[
        scores
    ]
    output, lse = fastgru.flash_attention(query, key, value, return_lse=True)
    seen = torch.ones(13, keys, dtype=torch.bool)
    with_mask = fastgru.flash_attention(query, key, value, attn_mask=seen, return_lse=True)
    assert torch.equal(output, with_mask[0]) and torch.equal(lse, with_mask[1])
    exact = [t.double() for t in (query, key, value)]
    products = exact[0] @ exact[1].mT / 32**0.5
    want = products.softmax(-1) @ exact[2]
    torch.testing.assert_close(lse.double(), products.logsumexp(-1), rtol=2e-6, atol=2e-5)
    peer = F.scaled_dot_product_attention(query, key, value, attn_mask=torch.zeros(13, keys, dtype=dtype))
    # No terms are larger than the values: one eps of those is enough.
    found = testing.compare("output", [(output, peer, want)], dtype, floor=1)
    assert found.ok, found


def test_gradients_of_few_queries_whose_scores_are_large(engine: str) -> None:
    # The backward pass subtracts lse from the scores: they have to be those of the forward pass, bit by bit.
    query, grad = 3 * torch.randn(2, 4, 1, 128), torch.randn(2, 4, 1, 128)
    key, value = torch.randn(2, 4, 128, 128) + 5 * torch.randn(128), torch.randn(2, 4, 128, 128)

    def gradients(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        tensors = [t.to(dtype, copy=True).requires_grad_() for t in (query, key, value)]
        return torch.autograd.grad(function(*tensors), tensors, grad.to(dtype))

    ours = gradients(fastgru.scaled_dot_product_attention, torch.float32)
    peer = gradients(F.scaled_dot_product_attention, torch.float32)
    for got, theirs, want in zip(ours, peer, gradients(F.scaled_dot_product_attention, torch.float64), strict=True):
        assert (got - want).abs().max() <= 3 * (theirs - want).abs().max()


# ---- the same every time ----


OPTIONS: list[dict[str, Any]] = [
    {"causal": True, "dropout_p": 0.3},
    {"softcap": 2.0, "bias": torch.linspace(-1, 1, 150).view(1, 1, 1, 150)},
    {"window": (20, 3), "k_lengths": torch.tensor([150, 77])},
]


@feature("deterministic backward", "always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["dropout", "bias", "window"])
def test_bitwise_equal_for_100_calls_and_any_number_of_threads(options: dict[str, Any], dtype: torch.dtype) -> None:
    # Large enough that the forward pass too wakes every thread.
    tensors = qkv(2, 4, 100, 150, 32, dtype=dtype)
    want = with_gradients(tensors, **options)
    try:
        for call in range(100):
            torch.set_num_threads(1 + call % 3)
            assert all(torch.equal(a, b) for a, b in zip(want, with_gradients(tensors, **options), strict=True))
    finally:
        torch.set_num_threads(1)


def test_independent_of_the_batch(engine: str) -> None:
    tensors = qkv(3, 4, 66, 101, 33)
    whole = with_gradients(tensors, causal=True)
    for b, h in ((0, 0), (2, 3)):
        part = [t[b : b + 1, h : h + 1].detach().requires_grad_() for t in tensors]
        for a, c in zip(whole, with_gradients(part, causal=True), strict=True):
            torch.testing.assert_close(a[b : b + 1, h : h + 1], c, rtol=0, atol=0 if engine != "reference" else 1e-6)


# ---- dropout ----


@feature("dropout")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("queries", [4, 300])
def test_dropout_drops_as_often_as_asked(engine: str, queries: int, p: float) -> None:
    H = 1200 // queries
    zeros = torch.zeros(1, H, queries, 2)
    keys = torch.zeros(1, H, 200, 2)
    weights = fastgru.flash_attention(zeros, keys, torch.eye(200).expand(1, H, 200, 200), dropout_p=p)
    dropped = weights == 0
    # 240 000 positions: one standard deviation is at most 0.001; per query and per key of 1200 or 200.
    assert abs(dropped.double().mean().item() - p) < 0.006
    assert (dropped.double().mean(-1) - p).abs().max() < 0.25
    assert (dropped.double().mean((0, 1, 2)) - p).abs().max() < 0.09
    torch.testing.assert_close(weights[~dropped], torch.full_like(weights[~dropped], 1 / 200 / (1 - p)))


def test_dropout_of_everything(backend: str) -> None:
    tensors = qkv()
    output = fastgru.scaled_dot_product_attention(*tensors, dropout_p=1.0)
    assert not output.any() and not any(t.any() for t in torch.autograd.grad(output.sum(), tensors))


@feature("dropout")
def test_dropout_is_the_same_on_every_backend_and_follows_the_seed() -> None:
    for dtype, lengths in itertools.product([torch.float32, torch.float64], [(3, 40), (70, 201)]):
        tensors = qkv(2, 2, *lengths, dtype=dtype)
        with fastgru.use_backend("reference"):
            want = with_gradients(tensors, dropout_p=0.3, causal=True)
        torch.testing.assert_close(with_gradients(tensors, dropout_p=0.3, causal=True), want)
        torch.manual_seed(4)
        assert not torch.equal(fastgru.flash_attention(*tensors, dropout_p=0.3, causal=True), want[0])


# ---- derivatives and operators ----


@feature("double backward")
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "softcap": 1.5, "dropout_p": 0.3}, {"window": (2, 1), "k_lengths": torch.tensor([3, 7])}],
    ids=["plain", "causal-softcap-dropout", "window-lengths"],
)
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    bias = draw(1, 3, 5, 7, dtype=torch.float64)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        output, lse = fastgru.flash_attention(q, k, v, bias=bias, **options, return_lse=True)
        return output, lse.masked_fill(lse.isinf(), 0)

    leaves = (*qkv(dtype=torch.float64), bias)
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_transforms_of_torch_func(backend: str) -> None:
    tensors = [t.detach().double() for t in qkv()]
    tangents = [torch.randn_like(t) for t in tensors]

    def ours(*t: Tensor) -> Tensor:
        return fastgru.flash_attention(*t, causal=True, causal_align="top_left")

    def theirs(*t: Tensor) -> Tensor:
        mask = torch.ones(5, 7, dtype=torch.bool).tril()
        return (t[0] @ t[1].mT / 2).masked_fill(~mask, -torch.inf).softmax(-1) @ t[2]

    torch.testing.assert_close(jvp(ours, tuple(tensors), tuple(tangents)), jvp(theirs, tuple(tensors), tuple(tangents)))
    stacked = [torch.stack([t, 2 * t]) for t in tensors]
    torch.testing.assert_close(vmap(ours)(*stacked), torch.stack([theirs(*tensors), theirs(*[2 * t for t in tensors])]))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="that of torch 2.10 knows no properties of a NamedTuple")
def test_compile_of_transforms(backend: str) -> None:
    torch._dynamo.reset()
    tensors = tuple(t.detach() for t in qkv())

    def ours(*t: Tensor) -> Tensor:
        return fastgru.flash_attention(*t, causal=True)

    def function(*t: Tensor) -> tuple[Any, ...]:
        return jvp(ours, t, t), grad(lambda *t: ours(*t).sin().sum())(*t), vmap(lambda q: ours(q, *t[1:]))(t[0][None])

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


def operator_arguments(requires_grad: bool, full: bool) -> list[Any]:
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in qkv(2, 4))
    k, v = (t.detach()[:, :2].requires_grad_(requires_grad) for t in (k, v))
    if not full:
        return [q, k, v, *[None] * 6, 0.0, 0.5, 0.0, -1, 0, True]
    bias = torch.randn(1, 4, 5, 1, requires_grad=requires_grad)
    lengths = torch.tensor([5, 2]), torch.tensor([3, 7])
    return [
        q,
        k,
        v,
        bias,
        torch.rand(2, 1, 5, 7) > 0.3,
        *lengths,
        torch.rand(1, 4),
        torch.tensor(5),
        0.3,
        0.5,
        2.0,
        3,
        0,
        True,
    ]


@feature("torch.compile", "opcheck")
@pytest.mark.parametrize("full, requires_grad", [(False, False), (True, False), (True, True)])
def test_opcheck(backend: str, full: bool, requires_grad: bool) -> None:
    ops, arguments = ATTENTION_OPS[backend], operator_arguments(requires_grad, full)
    torch.library.opcheck(ops.forward, tuple(arguments))
    with torch.no_grad():
        output, lse, statistics = ops.forward(*arguments)
    seeds = [torch.randn_like(t).requires_grad_(requires_grad) for t in (output, lse)]
    torch.library.opcheck(ops.backward, (*seeds, *arguments, output, statistics, True))
    if not full:
        torch.library.opcheck(ops.backward, (None, seeds[1], *arguments, output, statistics, False))


def test_double_backward_without_the_gradient_of_the_bias(backend: str) -> None:
    q, k, v = qkv(dtype=torch.float64)
    bias = torch.randn(5, 7, dtype=torch.float64)
    assert gradgradcheck(lambda *t: fastgru.flash_attention(*t, bias=bias), (q, k, v), fast_mode=True)


@feature("torch.compile", "fullgraph")
@feature("torch.compile", "export")
def test_compile_and_export(backend: str) -> None:
    torch._dynamo.reset()
    bias = draw(3, 5, 7)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_last = flash_attn.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return fastgru.flash_attention(q, k, v, bias=bias, window=(3, 2)) + heads_last.transpose(1, 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 4):
        tensors = qkv(B)
        got, want = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sin().sum(), tensors), torch.autograd.grad(want.sin().sum(), tensors)
        )

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return fastgru.flash_attention(*tensors, causal=True)

    tensors = [t.detach() for t in tensors]
    torch.testing.assert_close(torch.export.export(Module(), tuple(tensors)).module()(*tensors), Module()(*tensors))


def test_autocast(backend: str) -> None:
    tensors = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        output = fastgru.flash_attention(*tensors)
    assert torch.equal(output, fastgru.flash_attention(*(t.bfloat16() for t in tensors)))


def test_a_backend_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._implementations, ("attention", "cpu"))
    monkeypatch.setattr(registry, "_warned", set())
    if fastgru.explain().count("cpu: chosen"):
        assert "attention: runs on 'reference'" in fastgru.explain()
        with fastgru.use_backend("auto"), pytest.warns(RuntimeWarning, match="'cpu' has no attention"):
            fastgru.flash_attention(*qkv(), return_lse=True)
        with fastgru.use_backend("cpu"), pytest.raises(fastgru.BackendUnavailable, match="has no attention"):
            fastgru.flash_attention(*qkv(), return_lse=True)
    assert "additive attention: runs on 'reference'" in fastgru.explain()


# ---- the operators of few arguments ----


class Recorded(TorchDispatchMode):
    """The names of the operators of attention that do not refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastgru":
            self.names.append(func._schema.name.removeprefix("fastgru::cpu_"))
        return result


PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("all", {}),
    ("causal", {"causal": True}),
    ("top left", {"causal": True, "causal_align": "top_left"}),
    ("scale", {"scale": 0.3}),
    ("groups", {"enable_gqa": True}),
    ("mask of keys", {"attn_mask": torch.tensor([True, False, True, True, False, True, True])}),
    ("mask of scores", {"attn_mask": torch.rand(5, 7) < 0.5, "causal": True}),
    ("mask of heads", {"attn_mask": torch.rand(4, 5, 1) < 0.7}),
    ("mask of all", {"attn_mask": torch.rand(2, 1, 5, 7) < 0.5}),
]


@pytest.mark.skipif(fastgru._library.load_error is not None, reason="they are the C++ library's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [options for _, options in PLAIN], ids=[name for name, _ in PLAIN])
def test_few_arguments_compute_the_same(options: dict[str, Any], dtype: torch.dtype) -> None:
    heads = 2 if options.get("enable_gqa") else 4
    tensors = [draw(2, 5, 4, 20, dtype=dtype), *(draw(2, heads, 7, columns, dtype=dtype) for columns in (20, 33))]
    tensors[0] = tensors[0].detach().transpose(1, 2).requires_grad_()
    # Lengths that hide nothing ask for the long way.
    results, names = [], []
    for extra in ({}, {"q_lengths": torch.tensor([5, 5])}):
        with Recorded() as recorded:
            results.append(with_gradients(tensors, **options, **extra))
            with torch.no_grad():
                results[-1].append(fastgru.flash_attention(*tensors, **options, **extra))
        names.append(recorded.names)
    assert names[0] == ["attention_plain_forward", "attention_plain_backward", "attention_plain_forward"]
    assert names[1] == ["attention_forward", "attention_backward", "attention_forward"]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.skipif(fastgru._library.load_error is not None, reason="they are the C++ library's")
def test_few_arguments_where_nothing_else_is_asked_for() -> None:
    tensors = qkv()

    def names(function: Callable[[], Any]) -> list[str]:
        with Recorded() as recorded:
            function()
        return recorded.names

    q, k, v = tensors
    sdpa = fastgru.scaled_dot_product_attention
    assert names(lambda: sdpa(q, k, v)) == ["attention_plain_forward"]
    assert names(lambda: sdpa(q[:, 0], k[:, 0], v[:, 0])) == ["attention_plain_forward"]
    assert names(lambda: sdpa(q, k[:, :1], v[:, :1])) == ["attention_plain_forward"]
    with torch.autocast("cpu", torch.bfloat16):
        assert names(lambda: sdpa(q, k, v)) == ["attention_forward"]
    assert names(lambda: sdpa(q, k, v, torch.zeros(5, 7))) == ["attention_forward"]
    assert names(lambda: fastgru.flash_attention(q, k, v, softcap=2.0)) == ["attention_forward"]
    assert names(lambda: vmap(sdpa)(*(t[None] for t in tensors))) == []
    with fastgru.use_backend("reference"):
        assert names(lambda: sdpa(q, k, v)) == ["fastgru::reference_attention_forward"]
    # What is to be differentiated again.
    grads = torch.autograd.grad(sdpa(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(torch.autograd.grad(sdpa(q, k, v).sum(), q)[0].sum(), k)
    assert torch.autograd.grad(grads[0].sum(), k)[0].any()


# ---- memory ----


@pytest.mark.skipif(fastgru._library.load_error is not None, reason="the reference backend has its own test")
def test_memory_is_linear_in_the_lengths() -> None:
    peaks = []
    for length in (2000, 8000):
        tensors = [t.detach().requires_grad_() for t in qkv(1, 1, length, length, 16)]
        with torch.profiler.profile(profile_memory=True) as profile:
            with_gradients(tensors)
        peaks.append(sum(max(0, event.cpu_memory_usage) for event in profile.events()))
    # All that was ever allocated. Quadratic memory would be 16 times as much.
    assert peaks[1] < 6 * peaks[0] and peaks[1] < 8000 * 8000


# ---- SDPA ----


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((2,), (2,)), ((), ()), ((2, 2, 3), (2, 2, 3))], ids=str)
@pytest.mark.parametrize("how", ["plain", "causal", "bool", "float"])
def test_sdpa(backend: str, how: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    lead, key_lead = shapes
    q, k, v = torch.randn(*lead, 5, 4), torch.randn(*key_lead, 7, 4), torch.randn(*key_lead, 7, 6)
    options: dict[str, Any] = {"is_causal": how == "causal", "scale": 0.3}
    if how in ("bool", "float"):
        mask = torch.randn(*lead, 5, 7)
        mask[..., 0] = 1
        options["attn_mask"] = mask > 0 if how == "bool" else mask
    want = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(fastgru.scaled_dot_product_attention(q, k, v, **options), want)


def test_sdpa_gqa_and_errors(backend: str) -> None:
    q, k = torch.randn(2, 4, 5, 4), torch.randn(2, 2, 7, 4)
    want = F.scaled_dot_product_attention(q, k, k, enable_gqa=True, is_causal=True)
    torch.testing.assert_close(fastgru.scaled_dot_product_attention(q, k, k, enable_gqa=True, is_causal=True), want)
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
        fastgru.scaled_dot_product_attention(q, k, k, torch.ones(5, 7), is_causal=True, enable_gqa=True)
    with pytest.raises(RuntimeError, match="Expected query, key, and value to all be at least 2 dim"):
        fastgru.scaled_dot_product_attention(q[0, 0, 0], k, k)
    with pytest.raises(ValueError, match="leading sizes must fit each other, got query"):
        fastgru.scaled_dot_product_attention(q[:, :3], k, k)
    with pytest.raises(ValueError, match="the 4 heads of query must be a multiple of the 3 heads of key"):
        fastgru.scaled_dot_product_attention(q, torch.randn(2, 3, 7, 4), k, enable_gqa=True)


@pytest.mark.parametrize(
    "key, value, gqa",
    [
        ((1, 4), (1, 4), False),
        ((2, 1), (2, 1), False),
        ((), (4,), False),
        ((2, 2), (2, 1), True),
        ((1, 2), (2, 2), True),
    ],
    ids=str,
)
def test_sdpa_broadcasts(backend: str, key: tuple[int, ...], value: tuple[int, ...], gqa: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 4), torch.randn(*key, 7, 4), torch.randn(*value, 7, 3)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    torch.testing.assert_close(fastgru.scaled_dot_product_attention(q, k, v, enable_gqa=gqa), want)


# ---- flash-attn's functions ----


@pytest.fixture
def sequences() -> Iterator[list[list[Tensor]]]:
    """Queries and keys of three sequences, [L, H, D] each; one has no queries, one no keys."""
    return iter([[torch.randn(n, h, 8) for n, h in zip(lengths, (4, 2, 2), strict=True)] for lengths in LENGTHS])


LENGTHS = [(5, 9, 9), (0, 4, 4), (8, 3, 3), (2, 0, 0)]


def joined(sequences: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Laid end to end, and the cumulative lengths of queries and keys."""
    cumulative = [
        torch.tensor([0, *itertools.accumulate(len(s[which]) for s in sequences)], dtype=torch.int32)
        for which in (0, 1)
    ]
    return [torch.cat(tensors).requires_grad_() for tensors in zip(*sequences, strict=True)], cumulative


@feature("varlen/nested", "cu_seqlens")
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}, {"window_size": (2, 1)}], ids=str)
def test_varlen(backend: str, sequences: Iterator[list[Tensor]], options: dict[str, Any]) -> None:
    several = list(sequences)
    (q, k, v), (cu_q, cu_k) = joined(several)
    got, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 8, 9, return_attn_probs=True, **options)
    parts = [
        flash_attn.flash_attn_func(*(t.unsqueeze(0) for t in ts), return_attn_probs=True, **options) for ts in several
    ]
    torch.testing.assert_close(got, torch.cat([part[0][0] for part in parts]))
    torch.testing.assert_close(lse, torch.cat([part[1][0] for part in parts], 1))
    grads = torch.autograd.grad(got.sin().sum(), (q, k, v))
    leaves = [[t.clone().requires_grad_() for t in ts] for ts in several]
    for ts in leaves:
        flash_attn.flash_attn_func(*(t.unsqueeze(0) for t in ts), **options).sin().sum().backward()
    for got, tensors in zip(grads, zip(*leaves, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat([t.grad for t in tensors]))


def test_packed_functions(backend: str) -> None:
    qkv = torch.randn(2, 6, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    want = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert want.shape == q.shape and want.is_contiguous()
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), want)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], 0.0, None, True), want)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat = want.flatten(0, 1)
    packed = qkv.flatten(0, 1)
    torch.testing.assert_close(flash_attn.flash_attn_varlen_qkvpacked_func(packed, cu, 6, causal=True), flat)
    got = flash_attn.flash_attn_varlen_kvpacked_func(packed[:, 0], packed[:, 1:], cu, cu, 6, 6, causal=True)
    torch.testing.assert_close(got, flat)


def test_signatures_are_those_of_flash_attn() -> None:
    common = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    for function, first, last in (
        (flash_attn.flash_attn_func, "q k v", ""),
        (flash_attn.flash_attn_kvpacked_func, "q kv", ""),
        (flash_attn.flash_attn_qkvpacked_func, "qkv", ""),
        (flash_attn.flash_attn_varlen_func, f"q k v {lengths}", "block_table"),
        (flash_attn.flash_attn_varlen_kvpacked_func, f"q kv {lengths}", ""),
        (flash_attn.flash_attn_varlen_qkvpacked_func, "qkv cu_seqlens max_seqlen", ""),
    ):
        assert list(inspect.signature(function).parameters) == f"{first} {common} {last}".split()
    with pytest.raises(TypeError, match="unexpected keyword"):
        flash_attn.flash_attn_qkvpacked_func(torch.randn(2, 6, 3, 4, 8), scale=1.0)


def naive_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [H, D] at one position."""
    x, half = x.clone(), len(cos)
    for d in range(half):
        a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
        x[:, a], x[:, b] = x[:, a] * cos[d] - x[:, b] * sin[d], x[:, a] * sin[d] + x[:, b] * cos[d]
    return x


@feature("paged KV / decode", "KV cache")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "how", ["rows", "indexed", "leftpad", pytest.param("paged", marks=feature("paged KV / decode", "paged KV"))]
)
def test_kvcache(backend: str, how: str, interleaved: bool) -> None:
    B, capacity, page, new = 3, 16, 4, 2
    q, k, v = torch.randn(B, new, 4, 8), torch.randn(B, new, 2, 8), torch.randn(B, new, 2, 8)
    filled = torch.tensor([5, 0, 14], dtype=torch.int32)
    angles = torch.rand(capacity, 3)
    options: dict[str, Any] = {}
    rows, pad = torch.arange(B), torch.zeros(B, dtype=torch.int32)
    if how == "paged":
        k_cache, v_cache = torch.randn(2, 20, page, 2, 8)
        options["block_table"] = torch.randperm(20)[: B * capacity // page].view(B, -1).int()
    else:
        k_cache, v_cache = torch.randn(2, 5 if how == "indexed" else B, capacity, 2, 8)
        if how == "indexed":
            rows = torch.tensor([4, 0, 2])
            options["cache_batch_idx"] = rows.int()
        if how == "leftpad":
            pad = torch.tensor([2, 0, 3], dtype=torch.int32)
            options["cache_leftpad"] = pad

    def cached(cache: Tensor, b: int) -> Tensor:
        return cache[options["block_table"][b].long()].flatten(0, 1) if how == "paged" else cache[rows[b]]

    before = [[cached(cache, b).clone() for b in range(B)] for cache in (k_cache, v_cache)]
    got, lse = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        angles.cos(),
        angles.sin(),
        cache_seqlens=filled,
        causal=True,
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **options,
    )
    for b in range(B):
        n = int(filled[b])
        turned = [
            torch.stack(
                [naive_rotary(t[b, i], angles[n + i].cos(), angles[n + i].sin(), interleaved) for i in range(new)]
            )
            for t in (q, k)
        ]
        keys, values = before[0][b], before[1][b]
        keys[n : n + new], values[n : n + new] = turned[1], v[b]
        torch.testing.assert_close(cached(k_cache, b), keys)
        torch.testing.assert_close(cached(v_cache, b), values)
        used = slice(int(pad[b]), n + new)
        want, want_lse, _ = flash_attn.flash_attn_func(
            turned[0][None], keys[None, used], values[None, used], causal=True, return_attn_probs=True
        )
        torch.testing.assert_close(got[b], want[0])
        torch.testing.assert_close(lse[b], want_lse[0])


@feature("paged KV / decode", "paged KV")
def test_varlen_paged(backend: str) -> None:
    pages = torch.randn(2, 6, 4, 2, 8)
    table = torch.tensor([[3, 0], [5, 1]], dtype=torch.int32)
    q = torch.randn(5, 4, 8)
    cu_q, cu_k = (torch.tensor(t, dtype=torch.int32) for t in ([0, 2, 5], [0, 7, 11]))
    got = flash_attn.flash_attn_varlen_func(q, pages[0], pages[1], cu_q, cu_k, 3, 7, causal=True, block_table=table)
    for b, (rows, keys) in enumerate(((slice(0, 2), 7), (slice(2, 5), 4))):
        k, v = (t[table[b].long()].flatten(0, 1)[None, :keys] for t in pages)
        torch.testing.assert_close(got[rows], flash_attn.flash_attn_func(q[None, rows], k, v, causal=True)[0])


# ---- errors ----


def error(function: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        function()


def test_errors(backend: str) -> None:
    q, k, v = (t.detach() for t in qkv())
    run = fastgru.flash_attention
    cases: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([q[0], k, v], {}, r"query must be \[B, H, L, D\], got 3 dimensions"),
        ([q, k.double(), v], {}, "one floating dtype, got torch.float32 and torch.float64"),
        ([q.int(), k.int(), v.int()], {}, "one floating dtype"),
        ([q, k.to("meta"), v], {}, "one device"),
        ([q[:1], k, v], {}, "one batch size, got 1, 2 and 2"),
        ([q[..., :3], k, v], {}, "one head dimension, got 3 and 4"),
        ([q, k, v[:, :, 1:]], {}, "the same heads and length"),
        ([q, k[:, :2], v[:, :2]], {"enable_gqa": True}, "the 3 heads of query must be a multiple of the 2"),
        ([q, k[:, :1], v[:, :1]], {}, "pass enable_gqa=True"),
        ([q, k, v], {"causal_align": "middle"}, "'bottom_right' or 'top_left', got 'middle'"),
        ([q, k, v], {"dropout_p": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
        ([q, k, v], {"softcap": -1.0}, "softcap must be finite and not negative"),
        ([q, k, v], {"window": (-2, 0)}, "window must be two whole numbers"),
        ([q, k, v], {"window": (1.5, 0)}, "window must be two whole numbers"),
        ([q, k, v], {"window": (None, 0)}, "window must be two whole numbers"),
        ([q, k, v], {"attn_mask": torch.ones(5, 6)}, r"attn_mask must be broadcastable to .* = \[2, 3, 5, 7\]"),
        ([q, k, v], {"attn_mask": torch.ones(5, 7).int()}, "attn_mask must be bool or floating, got torch.int32"),
        ([q, k, v], {"bias": torch.ones(5, 7).bool()}, "bias must be floating"),
        ([q, k, v], {"bias": torch.ones(5, 7, device="meta")}, "bias must be on cpu"),
        ([q, k, v], {"alibi_slopes": torch.ones(2)}, r"alibi_slopes must be \[Hq\] = \[3\]"),
        ([q, k, v], {"k_lengths": torch.ones(2)}, "k_lengths must be integers, got torch.float32"),
        ([q, k, v], {"q_lengths": torch.ones(3).int()}, r"q_lengths must have shape \[B\] = \[2\], got \[3\]"),
    ]
    for tensors, options, message in cases:
        error(lambda t=tensors, o=options: run(*t, **o), ValueError, message)
    for name in ("attn_mask", "bias", "alibi_slopes", "k_lengths"):
        error(lambda n=name: run(q, k, v, **{n: [1]}), TypeError, f"{name} must be a tensor, got list")
    error(lambda: run(q, k.numpy(), v), TypeError, "key must be a tensor, got ndarray")
    for name, most in (("q_lengths", 5), ("k_lengths", 7)):
        for wrong in (-1, most + 1):
            message = rf"{name} must lie in \[0, {most}\], got {wrong}"
            error(lambda n=name, w=wrong: run(q, k, v, **{n: torch.tensor([2, w])}), RuntimeError, message)


def test_errors_of_flash_attn(backend: str) -> None:
    q, cache = torch.randn(3, 2, 4), torch.randn(1, 4, 2, 4)

    def varlen(cu: list[int], longest: int = 3, **options: Any) -> Any:
        t = torch.tensor(cu, dtype=torch.int32)
        return flash_attn.flash_attn_varlen_func(q, q, q, t, t, longest, longest, **options)

    error(lambda: varlen([0, 2]), ValueError, "cu_seqlens_q must begin with 0 and end with the total of 3")
    error(lambda: varlen([0, 2, 1, 3]), ValueError, "must not decrease")
    error(lambda: varlen([0, 3], 2), ValueError, "longer than max_seqlen = 2")
    error(lambda: flash_attn.flash_attn_func(q, q, q), ValueError, r"q must be \[B, L, H, D\]")
    error(lambda: flash_attn.flash_attn_qkvpacked_func(cache), ValueError, "qkv must have 5 dimensions")
    kvcache = flash_attn.flash_attn_with_kvcache
    new = torch.randn(1, 2, 2, 4)
    error(lambda: kvcache(new, cache, cache, new), ValueError, "k and v must be given together")
    message = r"cache_seqlens must lie in \[0, 2\] \(a cache of 4, 2 new keys\), got "
    error(lambda: kvcache(new, cache, cache, new, new, cache_seqlens=3), ValueError, message + "3")
    error(lambda: kvcache(new, cache, cache, new, new, cache_seqlens=-1), ValueError, message + "-1")
    error(lambda: kvcache(new, cache, cache, cache_seqlens=5), ValueError, "cache_seqlens must lie in")
    wrong = new[:, :, :1]
    error(lambda: kvcache(new, cache, cache, wrong, wrong, cache_seqlens=0), ValueError, r"k must be \[1, 2, 2, 4\]")
    half = new.half()
    error(lambda: kvcache(new, cache, cache, half, half, cache_seqlens=0), ValueError, "the cache's torch.float32")
    angles = torch.randn(4, 3)
    rotary = {"rotary_cos": angles, "rotary_sin": angles}
    error(lambda: kvcache(new, cache, cache, cache_seqlens=0, **rotary), ValueError, "at most 4 / 2")
    rotary = {"rotary_cos": angles[:1, :2], "rotary_sin": angles[:1, :2]}
    error(lambda: kvcache(new, cache, cache, cache_seqlens=2, **rotary), ValueError, "rotary_cos has 1 positions")
    row = torch.tensor([1])
    error(
        lambda: kvcache(new, cache, cache, cache_seqlens=0, cache_batch_idx=row), ValueError, "cache_batch_idx must lie"
    )
    error(lambda: kvcache(new, cache, cache, block_table=torch.tensor([[2]])), ValueError, "block_table must lie in")
    error(lambda: kvcache(new, cache, cache, block_table=row), ValueError, "block_table must be .* with B = 1")
    # What lies beyond the lengths may be anything.
    table = torch.tensor([[0, -1]])
    assert kvcache(new, cache, cache, cache_seqlens=4, block_table=table).equal(kvcache(new, cache, cache))
    cu = torch.tensor([0, 3], dtype=torch.int32)
    error(lambda: flash_attn.flash_attn_varlen_func(q, q, q[1:], cu, cu, 3, 3), ValueError, "the same rows and heads")
    error(lambda: kvcache(new, cache, cache, new, new), ValueError, "cache_seqlens on, which is missing")


def test_a_float32_mask_with_half_queries_is_converted(backend: str) -> None:
    tensors = [t.detach().half() for t in qkv()]
    mask = torch.randn(5, 7)
    got = fastgru.flash_attention(*tensors, attn_mask=mask)
    assert torch.equal(got, fastgru.flash_attention(*tensors, attn_mask=mask.half()))
