"""Arguments of the GRU's operators, and what the operators of every backend have to do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgru.ops.gru.schema import GruOps


def layer(
    packed: bool = False,
    bidirectional: bool = True,
    bias: bool = True,
    *,
    B: int = 3,
    H: int = 7,
    requires_grad: bool = False,
    **options: Any,
) -> list[Tensor | None]:
    """The arguments of a forward operator; ``options`` are a tensor's dtype and device."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=requires_grad, **options)

    weights: list[Tensor | None] = []
    for _ in range(2 if bidirectional else 1):
        weights += [draw(3 * H, 5), draw(3 * H, H), *([draw(3 * H), draw(3 * H)] if bias else [None, None])]
    weights += [None] * (8 - len(weights))
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    return [draw(8, 5) if packed else draw(4, B, 5), draw(2 if bidirectional else 1, B, H), *weights, sizes]


def backward_arguments(ops: GruOps, arguments: list[Tensor | None], requires_grad: bool = False) -> list[Any]:
    """Of the backward operator, without its flags."""
    with torch.no_grad():
        output, h_n, gates = ops.train(*arguments)
    seeds = [torch.randn_like(t).requires_grad_(requires_grad) for t in (output, h_n)]
    return [*seeds, *arguments, output, gates]


class Contract:
    """The tests of a backend: of its ``ops``, with what ``layer`` makes of each ``case``."""

    ops: GruOps
    layer: Callable[..., list[Tensor | None]]

    def test_infer_equals_train_bitwise(self, case: Any) -> None:
        arguments = self.layer(*case)
        for a, b in zip(self.ops.infer(*arguments), self.ops.train(*arguments), strict=False):
            assert torch.equal(a, b)

    def test_gradients_are_bitwise_the_same_each_time(self, case: Any) -> None:
        arguments = backward_arguments(self.ops, self.layer(*case))
        for a, b in zip(*(self.ops.backward(*arguments, True, True) for _ in range(2)), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("absent", [0, 1], ids=["grad_output", "grad_h_n"])
    def test_an_absent_gradient_is_zero(self, case: Any, absent: int) -> None:
        arguments = backward_arguments(self.ops, self.layer(*case))
        with_none = list(arguments)
        with_none[absent] = None
        arguments[absent] = torch.zeros_like(arguments[absent])
        got = self.ops.backward(*with_none, True, True)
        torch.testing.assert_close(got, self.ops.backward(*arguments, True, True), rtol=0, atol=0)

    def test_gradients_not_asked_for_are_empty(self, case: Any) -> None:
        arguments = backward_arguments(self.ops, self.layer(*case))
        everything = self.ops.backward(*arguments, True, True)
        for needs in ((True, False), (False, True), (False, False)):
            got = self.ops.backward(*arguments, *needs)
            for g, full, want in zip(got, everything, [needs[0], True, *[needs[1]] * 4], strict=True):
                assert torch.equal(g, full) if want else g.shape == (0,)

    def test_any_strides(self, case: Any) -> None:
        arguments = self.layer(*case)
        apart = [
            t if t is None or t.dtype == torch.int64 else torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]
            for t in arguments
        ]
        for a, b in zip(self.ops.infer(*apart), self.ops.infer(*arguments), strict=True):
            assert torch.equal(a, b)
