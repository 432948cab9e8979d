"""Tensors that are overwritten between forward and backward: allowed where nn.GRU on a CPU allows it, with the same
gradients, and refused where it refuses."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fastgru

ARGUMENTS = ["input", "hx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


def pair(*args: Any, **kwargs: Any) -> tuple[nn.GRU, fastgru.GRU]:
    theirs, ours = nn.GRU(*args, **kwargs), fastgru.GRU(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns; the type of its error; None where torch refuses what it does not need, as it does of a view."""
    try:
        return call()
    except RuntimeError as error:
        return RuntimeError if "modified by an inplace operation" in str(error) else None


def assert_same(got: Any, want: Any) -> None:
    if want is RuntimeError or got is RuntimeError:
        assert got is want
        return
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_argument_may_be_overwritten_where_nn_gru_does_not_need_it(
    backend: str, steps: int, bidirectional: bool
) -> None:
    theirs, ours = pair(3, 4, bidirectional=bidirectional)
    for module in (theirs, ours):
        module(torch.zeros(1, 1, 3))  # the second call may go without the dispatcher
    kept = {name: value.clone() for name, value in theirs.state_dict().items()}
    input, hx = torch.randn(steps, 2, 3), torch.randn(2 if bidirectional else 1, 2, 4)

    def gradients(module: nn.Module, wanted: tuple[str, ...], overwritten: str) -> list[Tensor]:
        module.load_state_dict(kept)
        tensors = {"input": input.clone(), "hx": hx.clone(), **dict(module.named_parameters())}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name.removesuffix("_reverse") in wanted)
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        tensors["input"], tensors["hx"] = tensors["input"] * 1, tensors["hx"] * 1
        output, h_n = module(tensors["input"], tensors["hx"])
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.removesuffix("_reverse") == overwritten:
                    tensor.mul_(float("nan"))
        return list(torch.autograd.grad(output.sum() + h_n.square().sum(), leaves))

    subsets = [subset for size in (1, 2, 5, 6) for subset in itertools.combinations(ARGUMENTS, size)]
    allowed = 0
    for wanted, overwritten in itertools.product(subsets, ARGUMENTS):
        want = outcome(lambda wanted=wanted, name=overwritten: gradients(theirs, wanted, name))
        got = outcome(lambda wanted=wanted, name=overwritten: gradients(ours, wanted, name))
        if want is not None:
            assert_same(got, want)
            allowed += want is not RuntimeError
    assert allowed > 50


def change_by_operators(tensor: Tensor) -> None:
    tensor.mul_(torch.linspace(-1, 2, tensor.size(-1), dtype=tensor.real.dtype))
    tensor[..., 0] = 0


@pytest.mark.parametrize("what", ["output", "h_n", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 2, "batch_first": True},
        {"bias": False},
        {"dtype": torch.float64},
        {"dtype": torch.complex64},
    ],
    ids=lambda options: ",".join(map(str, options)) or "plain",
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("save_gates", [True, False], ids=["gates", "no gates"])
def test_results_may_be_overwritten(
    backend: str, what: str, options: dict[str, Any], packed: bool, save_gates: bool
) -> None:
    dtype = options.get("dtype", torch.float32)
    theirs, ours = pair(3, 4, **options)
    ours.save_gates = save_gates
    steps = torch.randn(3, 5, 3, dtype=dtype)
    results = []
    for module in (theirs, ours):
        if dtype.is_complex:
            if backend == "cpu" or packed:
                pytest.skip("complex modules run on the reference backend, and torch does not pack")
            if module is theirs:
                module = fastgru.GRU(3, 4, **options)  # which nn.GRU has not on a CPU
                module.load_state_dict(ours.state_dict())
        x = steps.clone().requires_grad_()
        given: Any = pack_sequence([x[0], x[1, :4], x[2, :2]]) if packed else x
        for _ in range(2):
            output, h_n = module(given)
        data = output.data if packed else output
        if dtype.is_complex and module is not ours:
            data, h_n = data.clone(), h_n.clone()
        for name, tensor in (("output", data), ("h_n", h_n)):
            if what in (name, "both"):
                change_by_operators(tensor)
        loss = (data.abs().square().sum() if dtype.is_complex else data.square().sum()) + h_n.abs().sum()
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        results.append([data, h_n, *first, *second])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_overwritten_output_changes_no_bit_of_the_gradients(backend: str, dtype: torch.dtype) -> None:
    module = fastgru.GRU(5, 19, dtype=dtype)
    x = torch.randn(4, 2, 5, dtype=dtype)
    seed = torch.randn(4, 2, 19, dtype=dtype)
    plain = torch.autograd.grad(module(x)[0], list(module.parameters()), seed)
    output = module(x)[0]
    kept = output.view_as(output) + 0
    with torch.no_grad():
        output.fill_(float("nan"))
    assert_same(torch.autograd.grad(kept, list(module.parameters()), seed), plain)


def test_a_second_derivative_after_overwriting(backend: str) -> None:
    results = []
    for module in pair(3, 4, dtype=torch.float64):
        torch.manual_seed(1)
        x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
        output, _ = module(x)
        output.mul_(2)
        first = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
        results.append(torch.autograd.grad(first.square().sum(), [x, *module.parameters()]))
    assert_same(results[1], results[0])


def test_a_second_derivative_does_not_read_what_was_overwritten(backend: str) -> None:
    module = fastgru.GRU(3, 4, dtype=torch.float64)
    module.weight_ih_l0.requires_grad_(False)
    x = torch.randn(3, 2, 3, dtype=torch.float64) * 1
    output, _ = module(x)
    x.mul_(2)
    loss = output.square().sum()
    torch.autograd.grad(loss, module.weight_hh_l0, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, module.weight_hh_l0, create_graph=True)


def test_an_output_overwritten_between_two_backward_passes(backend: str) -> None:
    module = fastgru.GRU(3, 4)
    module.weight_ih_l0.requires_grad_(False)
    x = torch.randn(3, 2, 3)
    for early in (False, True):
        output, _ = module(x)
        loss = output.sum()
        want = torch.autograd.grad(loss, module.weight_hh_l0, retain_graph=True)
        if early:
            x.add_(0)  # an argument that is not read, and first of all
            assert_same(torch.autograd.grad(loss, module.weight_hh_l0, retain_graph=True), want)
        with torch.no_grad():
            output.mul_(3)
        got = outcome(lambda loss=loss: torch.autograd.grad(loss, module.weight_hh_l0, retain_graph=True))
        assert_same(got, RuntimeError if early else want)


def test_both_the_output_and_what_it_is_made_of_overwritten_is_an_error(backend: str) -> None:
    module = fastgru.GRU(3, 4)
    output, _ = module(torch.randn(3, 2, 3))
    output.mul_(2)
    with torch.no_grad():
        module.bias_ih_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_graph_that_was_freed_says_so_after_overwriting(backend: str) -> None:
    output, _ = fastgru.GRU(3, 4)(torch.randn(3, 2, 3))
    output.mul_(2)
    loss = output.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_an_overwritten_output_is_freed_with_its_graph() -> None:
    gc.collect()
    gc.disable()
    try:
        output, _ = fastgru.GRU(3, 4)(torch.randn(3, 2, 3))
        output.mul_(2)
        output.sum().backward(retain_graph=True)
        gone = weakref.ref(output)
        del output
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_module_may_have_its_output_overwritten(backend: str) -> None:
    module = fastgru.GRU(3, 4)
    x = torch.randn(3, 2, 3)
    traced = torch.jit.trace(module, x, check_trace=False)
    results = []
    for call in (module, traced):
        output, h_n = call(x)
        output.mul_(2), h_n.mul_(3)
        results.append(torch.autograd.grad(output.square().sum() + h_n.sum(), list(module.parameters())))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("with_hx", [False, True])
def test_the_state_of_a_cell_may_be_overwritten(backend: str, with_hx: bool) -> None:
    cell, plain = fastgru.GRUCell(3, 4), nn.GRUCell(3, 4)
    plain.load_state_dict(cell.state_dict())
    x, hx = torch.randn(2, 3), torch.randn(2, 4) if with_hx else None
    results = []
    for module in (cell, plain):
        state = hx
        for _ in range(3):
            state = module(x, state)
            state = state.mul_(2) if state.size(0) == 2 else state
            state = state.clone()
        results.append(torch.autograd.grad(state.sum(), list(module.parameters())))
    assert_same(results[0], results[1])
