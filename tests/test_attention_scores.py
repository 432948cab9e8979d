"""Scores of any size: weights sum to 1 and gradients are right, however large scores and additive masks are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru
from fastgru import testing

LOWEST = torch.finfo(torch.float32).min
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(queries: int, keys: int, columns: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 2, n, columns).to(dtype).requires_grad_() for n in (queries, keys, keys)]


def gradients(tensors: list[Tensor], seed: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients of query, key and value, in float64."""
    output = fastgru.flash_attention(*tensors, **options)
    return [t.detach().double() for t in (output, *torch.autograd.grad(output, tensors, seed.to(output.dtype)))]


def of_equal_scores(tensors: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The same where all scores of a row are equal: every weight is 1 / n."""
    query, key, value = (t.detach().double() for t in tensors)
    seed = seed.to(tensors[0].dtype).double()
    n, scale = key.size(2), query.size(3) ** -0.5
    output = value.mean(2, keepdim=True).expand(*query.shape)
    d_weights = seed @ value.mT
    d_scores = (d_weights - d_weights.mean(-1, keepdim=True)) / n
    d_value = seed.sum(2, keepdim=True).expand_as(value) / n
    return [output, d_scores @ key * scale, d_scores.mT @ query * scale, d_value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [LOWEST, -1e12, -1e9, 1e30], ids=str)
@pytest.mark.parametrize("sizes", [(6, 50), (1, 2), (3, 3), (4, 700), (17, 200), (13, 600)], ids=str)
def test_a_mask_that_leaves_nothing_of_the_scores(
    engine: str, sizes: tuple[int, int], added: float, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    if dtype == torch.float64:
        added *= 1e20
    elif added != LOWEST and not info.min < added < info.max:
        pytest.skip("no number of this type")
    tensors, seed = draw(*sizes, dtype=dtype), torch.randn(2, 2, sizes[0], 16)
    if dtype == torch.float16:
        # What the scores add is less than half a unit in the last place of the mask, if they are small.
        tensors = [*[(t / 64).detach().requires_grad_() for t in tensors[:2]], tensors[2]]
        added = info.min
    mask = torch.full(sizes, max(added, info.min), dtype=dtype)
    got = gradients(tensors, seed, attn_mask=mask)
    want = of_equal_scores(tensors, seed)
    if dtype == torch.float16:
        # 65504 is no large score: float32 keeps something of the products.
        double = [t.detach().double().requires_grad_() for t in tensors]
        with fastgru.use_backend("reference"):
            want = gradients(double, seed.half().double(), attn_mask=mask.double())
    for name, ours, exact in zip(("output", "query", "key", "value"), got, want, strict=True):
        # Gradients of query and key are sums of differences of products with values.
        limit = 32 * info.eps * max(1.0, exact.abs().max().item())
        if dtype == torch.float16:
            limit += 2e-3
        assert (ours - exact).abs().max() <= limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [2, 5, 8, 300])
def test_weights_of_equal_large_scores_sum_to_one(engine: str, length: int, dtype: torch.dtype) -> None:
    tensors = [torch.full((1, 1, length, 16), 133120.0, dtype=dtype).requires_grad_() for _ in range(3)]
    output, query, key, value = gradients(tensors, torch.ones(1, 1, length, 16))
    torch.testing.assert_close(output, torch.full_like(output, 133120), rtol=16 * torch.finfo(dtype).eps, atol=0)
    # Differences of equal sums of 16 products with values.
    assert max(query.abs().max(), key.abs().max()) <= torch.finfo(dtype).eps * 16 * 133120.0**2
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-6 if dtype != torch.bfloat16 else 8e-3, atol=0)


def math_path(tensors: list[Tensor], seed: Tensor, mask: Tensor | None) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    return [t.detach().double() for t in (output, *torch.autograd.grad(output, tensors, seed.to(output.dtype)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-3, 1e2, 3e4, 1e6, 1e12, 1e30], ids=str)
@pytest.mark.parametrize("sizes", [(3, 40), (17, 40), (17, 190), (70, 600)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "with a mask of -1e9"])
def test_no_less_exact_than_the_math_path(
    engine: str, sizes: tuple[int, int], size: float, dtype: torch.dtype, masked: bool
) -> None:
    if dtype == torch.float16 and (size > 1e6 or masked):
        pytest.skip("no number of this type")
    names = ("output", "query", "key", "value")
    errors, theirs, largest = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for _ in range(5):
        tensors = [(t.detach() * size**0.5).to(dtype) for t in draw(*sizes)[:2]]
        tensors.append(torch.randn(2, 2, sizes[1], 16).to(dtype))
        seed = torch.randn(2, 2, sizes[0], 16).to(dtype)
        mask = torch.where(torch.rand(sizes) < 0.5, 0.0, -1e9).to(dtype) if masked else None
        wide = [t.double().requires_grad_() for t in tensors]
        want = math_path(wide, seed, None if mask is None else mask.double())
        tensors = [t.requires_grad_() for t in tensors]
        for name, ours, peer, exact in zip(
            names, gradients(tensors, seed, attn_mask=mask), math_path(tensors, seed, mask), want, strict=True
        ):
            errors[name] = max(errors[name], (ours - exact).abs().max().item())
            theirs[name] = max(theirs[name], (peer - exact).abs().max().item())
            # What gradients of scores are differences of, times what they are multiplied with.
            by = {"query": wide[1], "key": wide[0]}.get(name)
            unit = exact if by is None else (seed.double() @ wide[2].mT).abs().max() * by.abs().max() / 4
            largest[name] = max(largest[name], unit.abs().max().item())
    # A row of several tiles of keys takes do . o from the rounded output, as torch's own flash kernel does; products of
    # bfloat16 take rounded gradients of scores.
    eps = torch.finfo(dtype).eps
    rounds = sizes[1] > 192 or engine == "cpu-avx512_bf16"
    for name in names:
        gradient = name in ("query", "key")
        floor = 1e-5 / eps if gradient and not rounds else testing.FLOOR
        multiple = 3 if gradient else testing.MULTIPLE
        limit = testing.error_limit(theirs[name], largest[name], dtype, multiple=multiple, floor=floor)
        assert errors[name] <= limit, f"{name}: error {errors[name]:.3g}, the math path's {theirs[name]:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4, 1e9])
@pytest.mark.parametrize(
    "how", ["one key", "causal", "window", "lengths", "mask", "float mask", "many keys, causal", "many keys, mask"]
)
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score(
    engine: str, how: str, size: float, dtype: torch.dtype
) -> None:
    if dtype == torch.float16 and size > 1e4:
        pytest.skip("no number of this type")
    length = 700 if "many" in how else 1 if how == "one key" else 20
    query, key, value = (t.detach() for t in draw(length, length, 24, dtype))
    query, key = ((t * size**0.5).requires_grad_() for t in (query, key))
    rows = slice(None) if how in ("one key", "window", "lengths") else slice(0, 1)
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[0] = torch.arange(length) == length // 2
    options: dict[str, Any] = {
        "window": {"window": (0, 0)},
        "lengths": {"k_lengths": torch.tensor([1, 1])},
        "mask": {"attn_mask": mask},
        "float mask": {"attn_mask": torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)},
    }.get(how.removeprefix("many keys, "), {"causal": how != "one key"})
    output = fastgru.flash_attention(query, key, value.requires_grad_(), **options)
    seed = torch.zeros_like(output)
    seed[:, :, rows] = torch.randn_like(output[:, :, rows])
    d_query, d_key, _ = torch.autograd.grad(output, (query, key, value), seed)
    assert not d_query.any() and not d_key.any()
    if how in ("one key", "window"):
        assert torch.equal(output, value)


def test_one_key_under_dropout(engine: str) -> None:
    tensors = draw(9, 1)
    _, query, key, value = gradients(tensors, torch.randn(2, 2, 9, 16), dropout_p=0.4)
    assert not query.any() and not key.any() and value.any()


@pytest.mark.parametrize("hidden", [LOWEST, -1e9, -1e4], ids=str)
def test_padding_hidden_by_large_numbers(engine: str, hidden: float) -> None:
    """The left padding of T5 and others: whole rows of finfo.min, which are means and are trained on."""
    tensors, seed = draw(20, 20), torch.randn(2, 2, 20, 16)
    shown = (torch.arange(20) >= torch.tensor([7, 0]).view(2, 1, 1, 1)) & torch.ones(20, 20, dtype=torch.bool).tril()
    mask = torch.where(shown, 0.0, hidden) + torch.randn(1, 2, 20, 20)
    got = gradients(tensors, seed, attn_mask=mask)
    want = math_path([t.detach().double().requires_grad_() for t in tensors], seed, mask.double())
    for ours, exact in zip(got, want, strict=True):
        assert ours.isfinite().all()
        if hidden == -1e4:
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", [LOWEST, -1e9], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_trains_on_rows_of_padding(engine: str, hidden: float, need_weights: bool) -> None:
    ours = fastgru.MultiheadAttention(16, 2, batch_first=True)
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(3, 9, 16)
    padding = torch.zeros(3, 9).masked_fill(torch.arange(9) >= torch.tensor([[9], [4], [0]]), hidden)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            # Without weights torch takes its flash kernel, which is less exact here.
            weights = need_weights or module is theirs
            output, _ = module(input, input, input, key_padding_mask=padding, need_weights=weights)
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_log_sums_of_large_scores(engine: str) -> None:
    for keys, queries in itertools.product((3, 600), (2, 9)):
        query, key, value = (1e5 * t.detach() for t in draw(queries, keys))
        _, lse = fastgru.flash_attention(query, key, value, return_lse=True)
        want = (query.double() @ key.double().mT / 4).logsumexp(-1)
        torch.testing.assert_close(lse.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e6, 1e12, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_additive_scores_of_any_size(size: float, dtype: torch.dtype) -> None:
    """Equal keys have equal scores, up to their rounding; weights sum to 1 in both passes."""
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 1, 8).expand(2, 5, 8), torch.randn(2, 1, 4).expand(2, 5, 4)
    leaves = [t.to(dtype).requires_grad_() for t in (query, key, value, size * torch.rand(8))]
    output = fastgru.additive_attention(*leaves)
    seed = torch.randn_like(output)
    _, d_key, d_value, _ = torch.autograd.grad(output, leaves, seed)
    torch.testing.assert_close(output, leaves[2][:, :1].expand_as(output), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_value.sum(1), seed.sum(1), rtol=1e-5, atol=1e-5)
    assert d_key.isfinite().all()
