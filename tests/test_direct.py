"""Calls without the dispatcher: they are taken where they should be, and are no different from the operators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastgru
from fastgru import _library, fast_path

pytestmark = pytest.mark.skipif(_library.direct is None, reason=f"there is no fastgru._direct: {_library.direct_error}")

REAL: Any = _library.direct
HOLDERS: list[tuple[Any, str]] = [(fast_path, "functions")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Spy:
    """fastgru._direct, with a note of every call and whether it was answered."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, bool]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(REAL, name)

        def call(*arguments: Any) -> Any:
            answer = function(*arguments)
            self.answers.append((name, answer is not None))
            return answer

        return call


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    with fastgru.use_backend("cpu"):
        for dtype in DTYPES:
            # Which has the backend chosen.
            fastgru.GRU(1, 1, dtype=dtype)(torch.zeros(1, 1, 1, dtype=dtype))
            fastgru.flash_attention(*torch.zeros(3, 1, 1, 1, 1, dtype=dtype))
        yield


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    for holder, name in HOLDERS:
        monkeypatch.setattr(holder, name, spy)
    return spy


def by_operators(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        for holder, name in HOLDERS:
            patch.setattr(holder, name, None)
        return call()


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in tensors(item)]


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (b.shape, b.dtype, b.stride(), b.requires_grad)
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (1, True), (3, False), (2, True)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_inference_is_the_operators(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layers: int, bidirectional: bool, bias: bool, batch_first: bool
) -> None:
    options: dict[str, Any] = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dtype": dtype}
    gru = fastgru.GRU(5, 19, layers, **options)
    directions = 2 if bidirectional else 1
    for T, B in ((1, 1), (1, 3), (4, 2)):
        x = torch.randn(B, T, 5, dtype=dtype) if batch_first else torch.randn(T, B, 5, dtype=dtype)
        for hx in (None, torch.randn(layers * directions, B, 19, dtype=dtype)):
            for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -2)[..., 0, :]):
                with torch.no_grad():
                    spy = Spy()
                    monkeypatch.setattr(fast_path, "functions", spy)
                    got = gru(given, hx)
                    assert spy.answers == [("infer", True)]
                    assert_same(got, by_operators(monkeypatch, lambda given=given, hx=hx: gru(given, hx)))
                    assert len({t.untyped_storage().data_ptr() for t in got}) == 2


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("T, B, size", [(1, 1, 5), (6, 3, 5), (2, 1, 300)], ids=["step", "sequence", "large weights"])
def test_gradients_are_the_operators(
    monkeypatch: pytest.MonkeyPatch, spy: Spy, bias: bool, T: int, B: int, size: int
) -> None:
    gru = fastgru.GRU(size, size, bias=bias)
    x, hx = torch.randn(T, B, size, requires_grad=True), torch.randn(1, B, size, requires_grad=True)
    outs = torch.randn(T, B, size), torch.randn(1, B, size)
    everything = [x, hx, *gru.parameters()]

    for wanted in (everything, everything[2:], everything[:1], everything[1:2], everything[2:3]):
        for used in (slice(0, 2), slice(0, 1), slice(1, 2)):

            def gradients(wanted: list[Tensor] = wanted, used: slice = used) -> Any:
                for t in everything:
                    t.requires_grad_(any(t is w for w in wanted))
                return torch.autograd.grad(gru(x, hx)[used], wanted, outs[used])

            spy.answers.clear()
            got = gradients()
            assert spy.answers == [("infer", True), ("train", True), ("backward", True)]
            assert_same(got, by_operators(monkeypatch, gradients))


def test_a_gradient_without_a_state_and_from_an_expanded_seed(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    gru = fastgru.GRU(4, 7, batch_first=True)
    x = torch.randn(2, 3, 4, requires_grad=True)

    def gradients() -> Any:
        return torch.autograd.grad(gru(x)[0].sum(), [x, *gru.parameters()])

    got = gradients()
    assert spy.answers == [("infer", True), ("train", True), ("backward", True)]
    assert_same(got, by_operators(monkeypatch, gradients))


def test_a_second_derivative_goes_through_the_operators(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    gru = fastgru.GRU(3, 4, dtype=torch.float64)
    x = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)

    def first() -> Tensor:
        return torch.autograd.grad(gru(x)[0].sum(), x, create_graph=True)[0]

    def second() -> Any:
        return torch.autograd.grad(first().square().sum(), [x, *gru.parameters()])

    first()
    assert spy.answers == [("infer", True), ("train", True)]
    assert_same(second(), by_operators(monkeypatch, second))


def test_gradients_that_accumulate_are_those_of_torch() -> None:
    gru, plain = fastgru.GRU(30, 30), nn.GRU(30, 30)
    plain.load_state_dict(gru.state_dict())
    x = torch.randn(1, 2, 30)
    for module in (gru, plain):
        for _ in range(2):
            module(x)[0].sum().backward()
    for (name, got), want in zip(gru.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_cell_is_the_operator(monkeypatch: pytest.MonkeyPatch, spy: Spy, dtype: torch.dtype, bias: bool) -> None:
    cell = fastgru.GRUCell(5, 19, bias=bias, dtype=dtype)
    x, hx = torch.randn(3, 5, dtype=dtype), torch.randn(3, 19, dtype=dtype)
    with torch.no_grad():
        got = cell(x, hx)
        assert spy.answers == [("cell", True)]
        assert_same(got, by_operators(monkeypatch, lambda: cell(x, hx)))
    spy.answers.clear()
    assert cell(x, hx).requires_grad
    assert spy.answers[0] == ("cell", False)


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    seen: list[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _dispatched(call: Callable[[], Any]) -> Any:
    with _Dispatch() as mode:
        mode.seen = []
        result = call()
    assert any("gru" in name for name in mode.seen)
    return result


def _in_function_mode(call: Callable[[], Any]) -> Any:
    with _Function():
        return call()


def _in_autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


def _profiled(call: Callable[[], Any]) -> Any:
    with torch.profiler.profile() as profile:
        result = call()
    assert any("gru" in event.key for event in profile.key_averages())
    return result


@pytest.mark.parametrize("mode", [_dispatched, _in_function_mode, _in_autocast, _profiled])
def test_what_wants_to_see_operators_sees_them(
    monkeypatch: pytest.MonkeyPatch, spy: Spy, mode: Callable[[Callable[[], Any]], Any]
) -> None:
    gru, x, hx = fastgru.GRU(3, 4), torch.randn(2, 1, 3), torch.randn(1, 1, 4)
    with torch.no_grad():
        got = mode(lambda: gru(x, hx))
        assert spy.answers == [("infer", False)]
        assert_same(got, by_operators(monkeypatch, lambda: mode(lambda: gru(x, hx))))
    spy.answers.clear()
    output = mode(lambda: gru(x, hx)[0])
    if mode is not _in_function_mode:  # which is off while it handles backward()
        mode(output.sum().backward)
    assert spy.answers and not any(answered for _, answered in spy.answers)


def test_transforms_see_operators(spy: Spy) -> None:
    gru, x = fastgru.GRU(3, 4), torch.randn(5, 2, 1, 3)
    with torch.no_grad():
        got = torch.func.vmap(lambda x: gru(x)[0])(x)
    assert not any(answered for _, answered in spy.answers)
    torch.testing.assert_close(got, torch.stack([nn.GRU.forward(gru, part)[0] for part in x]).detach())


class _Subclass(Tensor):
    pass


X, HX = torch.randn(2, 1, 3), torch.randn(1, 1, 4)


@pytest.mark.parametrize(
    "x, hx",
    [
        (X.as_subclass(_Subclass), HX),
        (X.to("meta"), HX),
        (X.to_sparse(), HX),
        (X.double(), HX),
        (X, HX.double()),
        (X[0], HX[0]),
        (X[..., :2], HX),
        (X, HX[..., :3]),
        (X, HX.expand(1, 2, 4)),
        (X[:0], HX),
        (X[:, :0], HX[:, :0]),
        (torch._neg_view(X), HX),
        (X, torch._neg_view(HX)),
        (X.long(), HX),
        (torch._efficientzerotensor((2, 1, 3)), HX),
        (X.numpy(), HX),
        (X, HX.numpy()),
        (None, HX),
    ],
    ids=[
        "subclass", "meta", "sparse", "input of float64", "hx of float64", "unbatched", "input size", "hidden size",
        "batch of hx", "no steps", "no rows", "negated input", "negated hx", "integers", "zero tensor", "array",
        "hx an array", "None",
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_the_operators(x: Any, hx: Any) -> None:
    gru = fastgru.GRU(3, 4)
    parameters, names = gru._parameters, gru._flat_weights_names
    weights = [parameters[name] for name in names]
    with torch.no_grad():
        assert REAL.infer({**vars(gru), "_parameters": parameters}, x, hx) is None
        assert REAL.train(x, hx, *weights) is None
        output, h_n, gates = REAL.train(X, HX, *weights)
        grads = torch.ones_like(output), torch.ones_like(h_n)
        assert REAL.backward(*grads, x, hx, *weights, output, gates, True, True) is None
        if hx is HX and x is not None:  # as a gradient it is not plain either
            assert REAL.backward(x, None, X, HX, *weights, output, gates, True, True) is None


@pytest.mark.parametrize(
    "x, hx",
    [
        (X[0].double(), HX[0]),
        (X[0], HX[0].double()),
        (X[0], HX),
        (X, HX[0]),
        (X[0, :, :2], HX[0]),
        (X[0], HX[0, :, :3]),
        (X[0].expand(2, 3), HX[0]),
        (X[0, 0], HX[0, 0]),
        (torch._neg_view(X[0]), HX[0]),
        (X[0], torch._neg_view(HX[0])),
    ],
)
def test_what_is_not_plain_is_left_to_the_operators_by_a_cell(x: Tensor, hx: Tensor) -> None:
    weights = [*fastgru.GRUCell(3, 4).parameters()]
    with torch.no_grad():
        assert REAL.cell(X[0], HX[0], *weights) is not None
        assert REAL.cell(x, hx, *weights) is None


@pytest.mark.parametrize("spoil", ["size", "dtype", "strides", "missing", "none", "negated"])
def test_weights_that_are_not_plain_are_left_to_the_operators(spoil: str) -> None:
    gru = fastgru.GRU(4, 4)
    parameters, names = dict(gru._parameters), list(gru._flat_weights_names)
    weight = parameters["weight_hh_l0"].detach()
    spoilt = {
        "size": weight[:, :3],
        "dtype": weight.double(),
        "strides": weight.reshape(4, 12).t(),
        "missing": None,
        "none": None,
        "negated": torch._neg_view(weight),
    }[spoil]
    parameters["weight_hh_l0"] = spoilt
    if spoil == "missing":
        del parameters["weight_hh_l0"]
    with torch.no_grad():
        x, hx = torch.randn(2, 1, 4), torch.randn(1, 1, 4)
        assert REAL.infer({**vars(gru), "_parameters": parameters}, x, hx) is None
        own = [parameters.get(name) for name in names]
        assert REAL.train(x, hx, *own) is None


def test_weights_replaced_in_any_way_are_the_ones_used() -> None:
    gru, x, hx = fastgru.GRU(3, 4), torch.randn(1, 1, 3), torch.randn(1, 1, 4)
    other = copy.deepcopy(gru)
    with torch.no_grad():
        gru(x, hx)
        for replace in (
            lambda: gru.weight_hh_l0.mul_(2),
            lambda: setattr(gru.weight_hh_l0, "data", torch.randn(12, 4)),
            lambda: setattr(gru, "weight_hh_l0", nn.Parameter(torch.randn(12, 4))),
            lambda: gru.load_state_dict(other.state_dict()),
            lambda: gru.double().float(),
        ):
            replace()
            assert_close_to_torch(gru, x, hx)
        changed = {name: torch.randn_like(value) for name, value in gru.named_parameters()}
        got = torch.func.functional_call(gru, changed, (x, hx))
        other.load_state_dict(changed)
        assert_same(got, other(x, hx))


def assert_close_to_torch(gru: fastgru.GRU, x: Tensor, hx: Tensor) -> None:
    plain = nn.GRU(gru.input_size, gru.hidden_size)
    plain.load_state_dict(gru.state_dict())
    torch.testing.assert_close(gru(x, hx), plain(x, hx))


def test_inference_mode_gives_tensors_of_it() -> None:
    gru, x = fastgru.GRU(3, 4), torch.randn(2, 1, 3)
    gru(x)
    with torch.inference_mode():
        output, h_n = gru(x)
    assert output.is_inference() and h_n.is_inference()


def heads_of(B: int, H: int, L: int, D: int, last: bool, **options: Any) -> Tensor:
    """[B, H, L, D] with positions before heads in memory if ``last``, as the projections of MultiheadAttention."""
    return torch.randn(B, L, H, D, **options).transpose(1, 2) if last else torch.randn(B, H, L, D, **options)


MASKS: dict[str, Callable[[int, int, int, int], Tensor | None]] = {
    "no mask": lambda B, H, Lq, Lk: None,
    "mask": lambda B, H, Lq, Lk: torch.rand(B, H, Lq, Lk) > 0.3,
    "mask of keys": lambda B, H, Lq, Lk: torch.rand(B, 1, 1, Lk) > 0.3,
    "mask of two dimensions": lambda B, H, Lq, Lk: torch.rand(Lq, Lk) > 0.3,
    "mask of queries": lambda B, H, Lq, Lk: torch.rand(B, H, Lq, 1) > 0.3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["heads first", "heads last"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("B, Hq, Hk, Lq, Lk, D", [(1, 1, 1, 1, 1, 8), (2, 4, 2, 3, 5, 20), (1, 2, 2, 70, 33, 16)])
def test_attention_is_the_operators(
    monkeypatch: pytest.MonkeyPatch,
    spy: Spy,
    dtype: torch.dtype,
    last: bool,
    mask: str,
    B: int,
    Hq: int,
    Hk: int,
    Lq: int,
    Lk: int,
    D: int,
) -> None:
    q = heads_of(B, Hq, Lq, D, last, dtype=dtype)
    k, v = (heads_of(B, Hk, Lk, D, last, dtype=dtype) for _ in range(2))
    seen, seed = MASKS[mask](B, Hq, Lq, Lk), torch.randn(B, Hq, Lq, D, dtype=dtype)
    for options in ({}, {"causal": True}, {"causal": True, "causal_align": "top_left", "scale": 0.3}):

        def run(options: dict[str, Any] = options) -> Any:
            return fastgru.flash_attention(q, k, v, attn_mask=seen, enable_gqa=Hq != Hk, **options)

        def gradients(run: Callable[[], Any] = run) -> Any:
            inputs = [t.requires_grad_() for t in (q, k, v)]
            found = torch.autograd.grad(run(), inputs, seed)
            for t in inputs:
                t.requires_grad_(False)
            return found

        spy.answers.clear()
        got = run()
        assert spy.answers == [("attention", True)]
        assert_same(got, by_operators(monkeypatch, run))
        spy.answers.clear()
        got = gradients()
        wide = dtype in (torch.float32, torch.float64)
        assert spy.answers == [("attention", True), ("attention_train", wide), ("attention_backward", wide)]
        assert_same(got, by_operators(monkeypatch, gradients))


def test_attention_by_the_name_of_torch(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.rand(5, 5) > 0.2}, {"scale": 2}):
        spy.answers.clear()
        got = fastgru.scaled_dot_product_attention(q, k, v, **options)
        assert spy.answers == [("attention", True)]
        assert_same(
            got, by_operators(monkeypatch, lambda o=options: fastgru.scaled_dot_product_attention(q, k, v, **o))
        )


def test_a_second_derivative_of_attention_goes_through_the_operators(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).requires_grad_().unbind()

    def first() -> Tensor:
        return torch.autograd.grad(fastgru.flash_attention(q, k, v).square().sum(), q, create_graph=True)[0]

    def second() -> Any:
        return torch.autograd.grad(first().square().sum(), [q, k, v])

    first()
    assert spy.answers == [("attention", True), ("attention_train", True)]
    assert_same(second(), by_operators(monkeypatch, second))


Q = torch.randn(2, 4, 3, 8)
SEEN = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "q, k, v, mask, scale, grouped",
    [
        (Q[0], Q, Q, None, None, False),
        (Q, Q[:1], Q[:1], None, None, False),
        (Q, Q[:, :3], Q[:, :3], None, None, True),
        (Q, Q[:, :2], Q[:, :2], None, None, False),
        (Q, Q, Q[:, :, :2], None, None, False),
        (Q, Q, Q[..., :4], None, None, False),
        (Q, Q.double(), Q, None, None, False),
        (Q, Q, torch._neg_view(Q), None, None, False),
        (Q.as_subclass(_Subclass), Q, Q, None, None, False),
        (Q[:, :, :0], Q, Q, None, None, False),
        (Q, Q[:, :, :0], Q[:, :, :0], None, None, False),
        (Q.long(), Q.long(), Q.long(), None, None, False),
        (torch.randn(2, 4, 3, 16)[..., ::2], Q, Q, None, None, False),
        (Q, Q, Q, SEEN.float(), None, False),
        (Q, Q, Q, SEEN[:2], None, False),
        (Q, Q, Q, SEEN.expand(1, 1, 1, 3, 3), None, False),
        (Q, Q, Q, torch.ones(3, 6, dtype=torch.bool)[:, ::2], None, False),
        (Q, Q, Q, True, None, False),
        (Q, Q, Q, None, "half", False),
        (None, Q, Q, None, None, False),
    ],
)
def test_attention_that_is_not_plain_is_left_to_the_operators(
    q: Any, k: Any, v: Any, mask: Any, scale: Any, grouped: bool
) -> None:
    assert isinstance(REAL.attention(Q, Q, Q, SEEN, 0.5, True, True, False), Tensor)
    output, lse = REAL.attention_train(Q, Q, Q, SEEN, 0.5, True, True, False)
    arguments = q, k, v, mask, scale, False, True, grouped
    assert REAL.attention(*arguments) is None
    assert REAL.attention_train(*arguments) is None
    assert REAL.attention_backward(output, *arguments, output, lse) is None


def test_wrong_numbers_of_arguments_are_errors() -> None:
    counts = {
        "setup": 7, "infer": 3, "cell": 6, "train": 6, "backward": 12, "attention": 8, "attention_train": 8,
        "attention_backward": 11,
    }  # fmt: skip
    for name, count in counts.items():
        with pytest.raises(TypeError, match=f"expected {count} arguments, got 1"):
            getattr(REAL, name)(None)
