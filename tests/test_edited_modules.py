"""Modules whose settings, weights and biases were edited after they were made: what nn's modules do then, on every way
through, or their error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgru

numpy = pytest.importorskip("numpy")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(got: Any, want: Any, message: str) -> None:
    if isinstance(want, type) or isinstance(got, type):
        assert got is want, message
        return
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, message
        torch.testing.assert_close(a, b, msg=lambda text: f"{message}: {text}")


VALUES: dict[str, tuple[Any, ...]] = {
    "batch_first": (True, False, 1, 0, 2, None, "yes", torch.tensor(True)),
    "bidirectional": (True, False, 1, 0, None),
    "bias": (True, False, 1, 0, None),
    "training": (True, False, 1, 0, None),
    "num_layers": (1, 2, 3, 0, -1, 2.0, True, None, numpy.int64(1), numpy.int64(2)),
    "dropout": (0.5, 0, 1, 1.5, -0.5, True, None, "x", numpy.float64(0.5), float("nan")),
    "hidden_size": (3, 5, 0, 4.0, None, numpy.int64(4)),
    "input_size": (3, 5, 0, 4.0, None, numpy.int64(4)),
    "proj_size": (3, 4, 0, -1, None),
    "mode": ("LSTM", None),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"num_layers": 2}, {"bias": False}, {"bidirectional": True}, {"num_layers": 2, "bias": False},
)  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("with_gradients", [True, False], ids=["gradients", "no gradients"])
def test_a_setting_edited_later_is_what_nn_gru_makes_of_it(backend: str, name: str, with_gradients: bool) -> None:
    x = torch.randn(3, 2, 4)
    for options, value in itertools.product(OPTIONS, VALUES[name]):
        theirs, ours = nn.GRU(4, 4, **options), fastgru.GRU(4, 4, **options)
        ours.load_state_dict(theirs.state_dict())
        ours(x)  # only from the second call on it may go without the dispatcher

        def run(module: nn.Module, value: Any = value) -> Any:
            setattr(module, name, value)
            torch.manual_seed(1)
            with torch.set_grad_enabled(with_gradients):
                return module(x)

        want = outcome(lambda: run(theirs))  # noqa: B023
        assert_same(outcome(lambda: run(ours)), want, f"{name} = {value!r} of {options}")  # noqa: B023


@pytest.mark.parametrize("value", [1, numpy.bool_(True)], ids=["int", "numpy"])
@pytest.mark.parametrize("name", ["batch_first", "bidirectional", "bias", "training"])
def test_a_flag_of_another_type_is_an_error_everywhere(backend: str, name: str, value: Any) -> None:
    module = fastgru.GRU(4, 4)
    x = torch.randn(3, 3, 4)
    module(x)
    setattr(module, name, value)
    packed = nn.utils.rnn.pack_sequence([x[0]])
    for call in (
        lambda: module(x),
        lambda: module(x[0]),
        lambda: module(packed),
        lambda: module(x, lengths=[1, 2, 3]),
    ):
        with torch.no_grad(), pytest.raises(TypeError, match=f"{name} has to be of type bool"):
            call()
        with pytest.raises(TypeError, match=f"{name} has to be of type bool"):
            call()


@pytest.mark.parametrize("with_gradients", [True, False], ids=["gradients", "no gradients"])
def test_weights_of_other_sizes_are_refused_as_nn_gru_refuses_them(backend: str, with_gradients: bool) -> None:
    shapes = [(9, 4), (9, 3), (12, 3), (15, 4), (15, 5), (12, 5), (12,), (12, 4, 1), (0, 4), (1, 4), (12, 1)]
    edits: list[dict[str, Any]] = [
        {name: parameter(*shape)} for name in ("weight_ih_l0", "weight_hh_l0") for shape in shapes
    ]
    for size in (1, 3, 5, 8):
        biases = {name: parameter(3 * size) for name in ("bias_ih_l0", "bias_hh_l0")}
        edits.append({"weight_ih_l0": parameter(3 * size, 4), "weight_hh_l0": parameter(3 * size, size), **biases})
    for edit, hx in itertools.product(edits, (None, torch.randn(1, 2, 4))):
        theirs, ours = nn.GRU(4, 4), fastgru.GRU(4, 4)
        ours(torch.zeros(1, 1, 4))
        for module in (theirs, ours):
            for name, value in edit.items():
                setattr(module, name, value)
        x = torch.randn(3, 2, 4)
        with torch.set_grad_enabled(with_gradients):
            assert outcome(lambda: theirs(x, hx)) is RuntimeError  # noqa: B023
            assert outcome(lambda: ours(x, hx)) is RuntimeError, {n: v.shape for n, v in edit.items()}  # noqa: B023


def test_weights_of_other_sizes_are_refused_on_the_meta_device() -> None:
    module = fastgru.GRU(4, 4, device="meta")
    module.weight_hh_l0 = nn.Parameter(torch.empty(9, 3, device="meta"))
    with pytest.raises(RuntimeError, match=r"expected a weight or bias of shape \[12, 4\], got \[9, 3\]"):
        module(torch.randn(3, 2, 4, device="meta"))


def test_an_edited_cell_is_what_nn_makes_of_it(backend: str) -> None:
    edits: list[tuple[str, Any]] = [("hidden_size", value) for value in (3, 0, 5, 4.0, None)]
    edits += [("input_size", 2), ("bias", False), ("bias", 1), ("training", 1), ("training", None)]
    shapes = ((9, 3), (9, 4), (12, 4), (12, 2), (15, 4), (12,), (12, 3, 1), (0, 3))
    edits += [(name, parameter(*shape)) for name in ("weight_ih", "weight_hh") for shape in shapes]
    x = torch.randn(2, 3)
    for (name, value), hx, grad in itertools.product(edits, (None, torch.randn(2, 4)), (True, False)):
        theirs, ours = nn.GRUCell(3, 4), fastgru.GRUCell(3, 4)
        ours.load_state_dict(theirs.state_dict())
        results = []
        for cell in (ours, theirs):
            cell(x, torch.zeros(2, 4))
            setattr(cell, name, value)
            with torch.set_grad_enabled(grad):
                results.append(outcome(lambda: [cell(x, hx)]))  # noqa: B023
        assert_same(*results, f"{name} = {value!r}")


BIASES = [(), (1,), (1, 1), (1, 12), (12,), (3,), (0,), (6,), (12, 1), (1, 1, 12), (3, 12)]


def gradients(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    output = call(module)
    return [output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))]


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("which", ["ih", "hh", "both"])
@pytest.mark.parametrize("T", [1, 4])
def test_biases_broadcast_as_in_nn_gru(backend: str, shape: tuple[int, ...], which: str, T: int) -> None:
    x = torch.randn(T, 2, 3)
    theirs, ours = nn.GRU(3, 4), fastgru.GRU(3, 4)
    their_cell, our_cell = nn.GRUCell(3, 4), fastgru.GRUCell(3, 4)
    ours.load_state_dict(theirs.state_dict())
    our_cell.load_state_dict(their_cell.state_dict())
    for name in ("bias_ih", "bias_hh"):
        if which in (name[5:], "both"):
            bias = torch.randn(shape)
            for module, suffix in ((theirs, "_l0"), (ours, "_l0"), (their_cell, ""), (our_cell, "")):
                setattr(module, name + suffix, nn.Parameter(bias))
    for mine, other, call in (
        (ours, theirs, lambda m: m(x)[0]),
        (our_cell, their_cell, lambda m: m(x[0])),
        (our_cell, their_cell, lambda m: m(x[0], torch.ones(2, 4))),
    ):
        got = outcome(lambda: gradients(mine, call))  # noqa: B023
        want = outcome(lambda: gradients(other, call))  # noqa: B023
        assert_same(got, want, str(shape))
        with torch.no_grad():
            assert_same(outcome(lambda: [call(mine)]), outcome(lambda: [call(other)]), str(shape))  # noqa: B023


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_ih_l1"])
def test_a_missing_weight_or_bias_is_nns_error(backend: str, name: str) -> None:
    theirs, ours = nn.GRU(3, 4, 2), fastgru.GRU(3, 4, 2)
    x = torch.randn(3, 2, 3)
    ours(x)
    setattr(theirs, name, None)
    setattr(ours, name, None)
    deleted = fastgru.GRU(3, 4, 2)
    delattr(deleted, name)
    want = outcome(lambda: theirs(x))
    assert want in (TypeError, AttributeError)
    for module in (ours, deleted):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert outcome(lambda: module(x)) is want  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16):
            assert outcome(lambda: module(x)) is want  # noqa: B023


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_a_cells_missing_weight_is_nns_error(backend: str, name: str) -> None:
    for module in (nn.GRUCell(3, 4), fastgru.GRUCell(3, 4)):
        setattr(module, name, None)
        with pytest.raises(TypeError):
            module(torch.randn(2, 3))
        with torch.no_grad(), pytest.raises(TypeError):
            module(torch.randn(2, 3), torch.randn(2, 4))


def traced(cell: nn.Module, *arguments: Tensor) -> Tensor:
    return torch.jit.trace(cell, arguments, check_trace=False)(*arguments)


def in_autocast(cell: nn.Module, *arguments: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cell(*arguments).float()


def compiled(cell: nn.Module, *arguments: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(cell, backend="aot_eager", fullgraph=True)(*arguments)


def inferred(cell: nn.Module, *arguments: Tensor) -> Tensor:
    with torch.no_grad():
        return cell(*arguments)


def exported(cell: nn.Module, *arguments: Tensor) -> Tensor:
    return torch.export.export(cell, arguments).module()(*arguments)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("way", [nn.Module.__call__, inferred, traced, in_autocast, compiled, exported])
def test_a_cells_missing_bias_is_zero(backend: str, missing: str, way: Callable[..., Tensor]) -> None:
    theirs = nn.GRUCell(3, 4)
    with torch.no_grad():
        theirs.bias_ih.add_(1)
        theirs.bias_hh.sub_(1)
    setattr(theirs, missing, None)
    ours = fastgru.GRUCell(3, 4)
    setattr(ours, missing, None)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(5, 3), torch.randn(5, 4)
    ours(x, hx)
    every = [(x,), (x, hx), (x[0],), (x[0], hx[0]), (x[::2], hx[::2]), (x, hx.t().clone().t())]
    tolerance = {"rtol": 0, "atol": 3e-2} if way is in_autocast else {}
    for cell in (ours, fastgru.convert(copy.deepcopy(theirs))):
        for arguments in every[:2] if way in (compiled, exported) else every:
            got, want = way(cell, *arguments), theirs(*arguments)
            torch.testing.assert_close(got, want, **tolerance)
            if got.requires_grad:
                wanted = list(theirs.parameters())
                got_grads = torch.autograd.grad(got.sum(), list(cell.parameters()))
                for a, b in zip(got_grads, torch.autograd.grad(want.sum(), wanted), strict=True):
                    torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0.1} if tolerance else {}))


SIZES = [(10, 0), (0, 4), (0, 0), (0, 40), (1, 1)]


@pytest.mark.parametrize("I, H", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_cell_of_size_zero(engine: str, I: int, H: int, dtype: torch.dtype) -> None:
    theirs, ours = nn.GRUCell(I, H, dtype=dtype), fastgru.GRUCell(I, H, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    for batch, with_hx in itertools.product(((3,), (1,), (0,), ()), (True, False)):
        x = torch.randn(*batch, I, dtype=dtype, requires_grad=True)
        hx = torch.randn(*batch, H, dtype=dtype, requires_grad=True)
        results = []
        for cell in (theirs, ours):
            state = cell(x, hx) if with_hx else cell(x)
            leaves = [x, *([hx] if with_hx else []), *cell.parameters()]
            results.append([state, *torch.autograd.grad(state.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, **tolerance)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, hx), theirs(x, hx), **tolerance)


@pytest.mark.parametrize("I, H", SIZES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("save_gates", [True, False], ids=["gates", "no gates"])
def test_a_layer_of_size_zero(engine: str, I: int, H: int, bidirectional: bool, save_gates: bool) -> None:
    directions = 2 if bidirectional else 1
    weights = [w.detach().requires_grad_() for _ in range(directions) for w in nn.GRUCell(I, H).parameters()]
    hx = torch.randn(directions, 2, H, requires_grad=True)
    options = (weights, True, 1, 0.0, True, bidirectional)
    for sizes in (None, torch.tensor([2, 2, 1])):
        x = torch.randn(*((3, 2) if sizes is None else (5,)), I, requires_grad=True)
        got = fastgru.ops.gru(x, hx, *options, False, sizes, save_gates)
        want = torch._VF.gru(x, hx, *options, False) if sizes is None else torch._VF.gru(x, sizes, hx, *options)
        results = [
            [*pair, *torch.autograd.grad(pair[0].square().sum() + pair[1].sum(), [x, hx, *weights])]
            for pair in (got, want)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
