"""Derivatives by finite differences, of higher order, and through the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

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


def per_sample(module: nn.Module, *arguments: Any, **how: Any) -> dict[str, Tensor | None]:
    """By torch.nn.utils' way, which opacus calls "ew"."""
    output = call_for_per_sample_grads(module, **how)(*arguments)[0]
    (output.data if isinstance(output, PackedSequence) else output).square().sum().backward()
    return {name: getattr(p, "grad_sample", None) for name, p in module.named_parameters()}


PER_SAMPLE: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "time first": ({}, (torch.randn(5, 3, 4),), {"batch_first": False}),
    "with a state": ({}, (torch.randn(5, 3, 4), torch.randn(1, 3, 6)), {"batch_first": False}),
    "batch first": ({"batch_first": True, "bias": False}, (torch.randn(3, 5, 4),), {}),
    "two layers, both directions": (
        {"num_layers": 2, "bidirectional": True},
        (torch.randn(5, 3, 4),),
        {"batch_first": False, "loss_reduction": "mean"},
    ),
    "packed": ({}, (pack_sequence([torch.randn(n, 4) for n in (5, 3, 1)]),), {"batch_size": 3}),
    "one sequence": ({}, (torch.randn(5, 4),), {"batch_size": 1}),
}


@pytest.mark.parametrize("frozen", [[], ["weight_ih_l0"]], ids=["all", "one frozen"])
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_per_sample_gradients_by_expanded_weights(backend: str, name: str, frozen: list[str]) -> None:
    options, arguments, how = PER_SAMPLE[name]
    theirs, ours = nn.GRU(4, 6, **options), fastgru.GRU(4, 6, **options)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        for weight in frozen:
            module.get_parameter(weight).requires_grad_(False)
    torch.testing.assert_close(per_sample(ours, *arguments, **how), per_sample(theirs, *arguments, **how))


def test_per_sample_gradients_of_what_is_no_row_are_refused() -> None:
    class Padded(fastgru.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, lengths=[3, 5])

    with pytest.raises(RuntimeError, match="takes rows for samples"):
        per_sample(Padded(4, 6), torch.randn(5, 2, 4), batch_first=False)
