"""fastgru.GRU and GRUCell behave as torch.nn's do, beyond the numbers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastgru

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "dropout": 0.5},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]


def pair(*args: Any, **kwargs: Any) -> tuple[nn.GRU, fastgru.GRU]:
    """nn.GRU and fastgru.GRU with the same weights."""
    theirs = nn.GRU(*args, **kwargs)
    ours = fastgru.GRU(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(ours: Any, theirs: Any) -> None:
    """Same structure, strides and numbers, NaN for NaN."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    elif ours is not None:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_constructor_state_dict_and_repr(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs = nn.GRU(5, 6, **options)
    torch.manual_seed(1)
    ours = fastgru.GRU(5, 6, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [[tuple(w.shape) for w in layer] for layer in ours.all_weights] == [
        [tuple(w.shape) for w in layer] for layer in theirs.all_weights
    ]


def test_positional_constructor_arguments() -> None:
    args = (5, 6, 2, False, True, 0.25, True, 0, "cpu", torch.float64)
    assert repr(fastgru.GRU(*args)) == repr(nn.GRU(*args))
    assert fastgru.GRU(*args).weight_hh_l1_reverse.dtype == torch.float64


def test_repr_tells_save_gates() -> None:
    assert repr(fastgru.GRU(5, 6, save_gates=False)) == "GRU(5, 6, save_gates=False)"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_state_dict_both_ways(backend: str, options: dict[str, Any], assign: bool) -> None:
    ours = fastgru.GRU(5, 6, **options).eval()
    theirs = nn.GRU(5, 6, **options).eval()
    x = torch.randn(4, 3, 5)
    theirs.load_state_dict(ours.state_dict(), assign=assign)
    assert_same(ours(x), theirs(x))
    back = fastgru.GRU(5, 6, **options).eval()
    back.load_state_dict(theirs.state_dict(), assign=assign)
    assert_same(back(x), theirs(x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5), (4, 0, 5), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("options", CONFIGURATIONS[2:], ids=str)
def test_shapes_and_strides(
    backend: str, shape: tuple[int, ...], batch_first: bool, with_hx: bool, options: dict[str, Any]
) -> None:
    theirs, ours = pair(5, 6, **{**options, "batch_first": batch_first})
    x = torch.randn(shape)
    if batch_first and len(shape) == 3:
        x = torch.randn(shape[1], shape[0], shape[2])
    directions = 2 * theirs.num_layers
    hx = None
    if with_hx:
        hx = torch.randn(directions, 6) if len(shape) == 2 else torch.randn(directions, shape[1], 6)
    assert_same(ours(x, hx), theirs(x, hx))
    assert_same(ours(x, hx=hx), theirs(x, hx=hx))
    with torch.no_grad():
        assert_same(ours(x, hx), theirs(x, hx))


def test_batch_zero_has_gradients(backend: str) -> None:
    module = fastgru.GRU(5, 6, bidirectional=True)
    x = torch.randn(4, 0, 5, requires_grad=True)
    output, _ = module(x)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_packed(backend: str, enforce_sorted: bool, with_hx: bool) -> None:
    theirs, ours = pair(5, 6, 2, bidirectional=True)
    lengths = [5, 3, 2] if enforce_sorted else [2, 5, 3]
    packed = pack_sequence([torch.randn(n, 5) for n in lengths], enforce_sorted=enforce_sorted)
    hx = torch.randn(4, 3, 6) if with_hx else None
    got, want = ours(packed, hx), theirs(packed, hx)
    assert isinstance(got[0], PackedSequence)
    assert_same(got, want)


def test_non_contiguous_input_hx_and_weights(backend: str) -> None:
    theirs, ours = pair(5, 6)
    for module in (theirs, ours):
        weight = module.weight_hh_l0
        module.weight_hh_l0 = nn.Parameter(weight.detach().t().contiguous().t())
    x = torch.randn(3, 10, 4).permute(2, 0, 1)[..., ::2].requires_grad_()
    hx = torch.randn(6, 3, 1).permute(2, 1, 0).requires_grad_()
    assert not x.is_contiguous()
    got, want = ours(x, hx), theirs(x, hx)
    assert_same(got, want)
    # An expanded gradient has stride zero everywhere.
    leaves = [x, hx, *ours.parameters()]
    got_grads = torch.autograd.grad(got[0].sum(), leaves)
    want_grads = torch.autograd.grad(want[0].sum(), [x, hx, *theirs.parameters()])
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_the_same_masks(backend: str, packed: bool) -> None:
    theirs, ours = pair(5, 6, 3, dropout=0.5, bidirectional=True)
    x: Any = torch.randn(4, 3, 5)
    if packed:
        x = pack_sequence([x[:, 0], x[:2, 1]])
    torch.manual_seed(3)
    got = ours(x)
    torch.manual_seed(3)
    assert_same(got, theirs(x))
    assert_same(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "hx", "weight_hh_l0"])
def test_nan_and_inf_flow_through(engine: str, value: float, place: str) -> None:
    theirs, ours = pair(5, 20)
    x, hx = torch.randn(4, 3, 5), torch.randn(1, 3, 20)
    if place == "input":
        x[1, 1, 2] = value
    elif place == "hx":
        hx[0, 2, 1] = value
    else:
        for module in (theirs, ours):
            with torch.no_grad():
                module.weight_hh_l0[7, 3] = value
    results = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_(), hx.clone().requires_grad_()]
        output, h_n = module(*leaves)
        grads = torch.autograd.grad(output.sum() + h_n.sum(), [*leaves, *module.parameters()])
        results.append([output, h_n, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_parameters_are_read_at_every_call(backend: str) -> None:
    theirs, ours = pair(5, 6)
    x = torch.randn(4, 3, 5)
    for module in (theirs, ours):
        torch.manual_seed(5)
        module.weight_hh_l0.data = torch.randn(18, 6)
    assert_same(ours(x), theirs(x))
    for module in (theirs, ours):
        torch.manual_seed(6)
        module.weight_ih_l0 = nn.Parameter(torch.randn(18, 5))
    assert_same(ours(x), theirs(x))
    for module in (theirs, ours):
        parametrizations.weight_norm(module, "weight_hh_l0")
    assert_same(ours(x), theirs(x))
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_ih_l0", amount=0.5)
    assert_same(ours(x), theirs(x))
    output, _ = ours(x)
    output.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_functional_call(backend: str) -> None:
    theirs, ours = pair(5, 6, 2)
    x = torch.randn(4, 3, 5)
    other = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    assert_same(torch.func.functional_call(ours, other, (x,)), torch.func.functional_call(theirs, other, (x,)))
    assert_same(ours(x), theirs(x))


def test_copy_pickle_move_and_share(backend: str) -> None:
    theirs, ours = pair(5, 6, 2)
    x = torch.randn(4, 3, 5)
    assert_same(copy.deepcopy(ours)(x), theirs(x))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(x), theirs(x))
    assert_same(ours.double()(x.double()), theirs.double()(x.double()))
    ours.share_memory()
    assert_same(ours(x.double()), theirs(x.double()))


def test_flatten_parameters_does_nothing() -> None:
    ours = fastgru.GRU(5, 6)
    before = [p.data_ptr() for p in ours.parameters()]
    ours.flatten_parameters()
    assert [p.data_ptr() for p in ours.parameters()] == before


def test_meta_device() -> None:
    module = fastgru.GRU(5, 6, bidirectional=True, device="meta")
    output, h_n = module(torch.randn(4, 3, 5, device="meta"))
    assert (output.device.type, tuple(output.shape), tuple(h_n.shape)) == ("meta", (4, 3, 12), (2, 3, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    theirs, ours = pair(5, 6, 2)
    x = torch.randn(4, 3, 5).to(input_dtype)
    with torch.autocast("cpu", dtype):
        got, want = ours(x), theirs(x)
    # The same numbers, rounded to the products' type, and everything after that in float32.
    rounded = copy.deepcopy(ours).to(dtype)
    exact, _ = rounded.float()(x.to(dtype).float())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)
    torch.testing.assert_close(got[0].float(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps)
    got[0].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (5,), (0, 5)], ids=str)
def test_cell(engine: str, shape: tuple[int, ...], bias: bool, with_hx: bool) -> None:
    theirs = nn.GRUCell(5, 6, bias=bias)
    ours = fastgru.GRUCell(5, 6, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(shape, requires_grad=True)
    hx = torch.randn(*shape[:-1], 6, requires_grad=True) if with_hx else None
    got, want = ours(x, hx), theirs(x, hx)
    assert_same(got, want)
    leaves = [x, *([] if hx is None else [hx])]
    seed = torch.randn_like(want)
    assert_same(
        torch.autograd.grad(got, [*leaves, *ours.parameters()], seed),
        torch.autograd.grad(want, [*leaves, *theirs.parameters()], seed),
    )


def test_no_gradient_is_recorded_for_frozen_weights(backend: str) -> None:
    module = fastgru.GRU(5, 6).requires_grad_(False)
    output, _ = module(torch.randn(4, 3, 5))
    assert not output.requires_grad
    x = torch.randn(4, 3, 5, requires_grad=True)
    output, _ = module(x)
    output.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in module.parameters())


def test_inference_mode(backend: str) -> None:
    theirs, ours = pair(5, 6)
    with torch.inference_mode():
        x = torch.randn(4, 3, 5)
        got = ours(x)
        assert got[0].is_inference()
        assert_same(got, theirs(x))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_steps_that_no_sequence_reaches(backend: str, bidirectional: bool) -> None:
    """A hand-made PackedSequence may count zero rows at its end; nn.GRU takes it."""
    theirs = nn.GRU(3, 5, bidirectional=bidirectional)
    ours = fastgru.GRU(3, 5, bidirectional=bidirectional)
    ours.load_state_dict(theirs.state_dict())
    data = torch.randn(5, 3, requires_grad=True)
    results = []
    for module in (theirs, ours):
        output, h_n = module(PackedSequence(data, torch.tensor([2, 2, 1, 0, 0])))
        results.append((output.data, h_n, *torch.autograd.grad(output.data.sum() + h_n.square().sum(), data)))
    torch.testing.assert_close(results[1], results[0])
