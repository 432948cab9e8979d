"""Derivatives by finite differences, of higher order, and through the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastgru


def problem(packed: bool, **options: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of input, hx and the weights, and a point to differentiate it at."""
    module = fastgru.GRU(2, 3, dtype=torch.float64, **options)
    directions = module.num_layers * (2 if module.bidirectional else 1)
    x, hx = torch.randn(3, 2, 2), torch.randn(directions, 2, 3)
    leaves = [x.double(), hx.double(), *(p.detach() for p in module.parameters())]
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, hx: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        fed: Any = pack_padded_sequence(x, [2, 3], enforce_sorted=False) if packed else x
        output, h_n = functional_call(module, dict(zip(names, weights, strict=True)), (fed, hx))
        return (output.data if packed else output), h_n

    return function, tuple(leaf.requires_grad_() for leaf in leaves)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False, "bidirectional": True}, {"save_gates": False}],
    ids=str,
)
def test_gradcheck(engine: str, options: dict[str, Any], packed: bool) -> None:
    assert gradcheck(*problem(packed, **options), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"save_gates": False}], ids=str)
def test_gradgradcheck(backend: str, options: dict[str, Any], packed: bool) -> None:
    assert gradgradcheck(*problem(packed, **options), fast_mode=True)


@pytest.mark.parametrize("index", [0, 1], ids=["output", "h_n"])
def test_gradient_of_one_result_only(backend: str, index: int) -> None:
    function, leaves = problem(False, bidirectional=True)
    assert gradcheck(lambda *args: function(*args)[index], leaves, fast_mode=True)
    assert gradgradcheck(lambda *args: function(*args)[index], leaves, fast_mode=True)


def both() -> tuple[nn.GRU, fastgru.GRU, Tensor]:
    theirs = nn.GRU(3, 4, 2, dtype=torch.float64)
    ours = fastgru.GRU(3, 4, 2, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randn(5, 2, 3, dtype=torch.float64)


@torch.enable_grad()
def third(module: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    result = module(leaf)[0].sin().sum()
    for _ in range(2):
        (first,) = torch.autograd.grad(result, leaf, create_graph=True)
        result = first.sin().sum()
    return torch.autograd.grad(result, leaf)[0]


def forward_mode(module: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))[0]).tangent
        assert tangent is not None
        return tangent.clone()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "third derivative": third,
    "forward mode": forward_mode,
    "grad": lambda m, x: grad(lambda x: m(x)[0].sin().sum())(x),
    "grad of parameters": lambda m, x: list(
        grad(lambda p: functional_call(m, p, (x,))[0].sin().sum())(dict(m.named_parameters())).values()
    ),
    "jacrev": lambda m, x: jacrev(lambda x: m(x)[0].sin().sum(0))(x),
    "jvp": lambda m, x: jvp(lambda x: m(x)[0], (x,), (x.cos(),)),
    "hessian": lambda m, x: hessian(lambda x: m(x)[0].sin().sum())(x),
    "vmap": lambda m, x: vmap(lambda x: m(x)[0], in_dims=1)(x.unsqueeze(2)),
    "vmap of grad": lambda m, x: vmap(grad(lambda x: m(x)[0].sin().sum()), in_dims=1)(x.unsqueeze(2)),
}


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_the_numbers_of_nn_gru(backend: str, name: str, grad_mode: bool) -> None:
    theirs, ours, x = both()
    transform = TRANSFORMS[name]
    # vmap gives nn.GRU no batching rule, so one slice after the other is the oracle there.
    want = one_by_one(theirs, name, x) if name.startswith("vmap") else transform(theirs, x)
    with torch.set_grad_enabled(grad_mode):
        torch.testing.assert_close(transform(ours, x), want)


def one_by_one(module: nn.Module, name: str, x: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return grad(lambda x: module(x)[0].sin().sum())(x) if "grad" in name else module(x)[0]

    return torch.stack([one(x[:, i : i + 1]) for i in range(x.size(1))])
