"""Nothing is timed before its numbers have been compared with torch's own operator in float64.

What is ours obeys the rule of docs/numerics.md: at most twice the error that torch's operator makes in the same dtype
(three times for the gradients of attention), and a floor of 4 eps. A peer may round more; it must compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peers_gru import as_torch, training_step
from problems import Attention, Problem
from torch import Tensor, nn

from fastgru import testing


class WrongNumbersError(Exception):
    """Not rounding: nothing is timed."""


def compare(
    got: Sequence[Any], torchs: Sequence[Tensor], exact: Sequence[Tensor], ours: bool, multiple: float
) -> float:
    """The largest error of ``got`` in parts of what is allowed for it.

    Raises:
        WrongNumbersError: it is above 1, or not a number.
    """
    worst = 0.0
    for result, theirs, want in zip(got, torchs, exact, strict=True):
        # A peer may choose faster and less exact functions; a wrong formula is still far beyond this.
        rule = {"multiple": multiple} if ours else {"multiple": 16.0, "floor": 64.0}
        tensors = torch.as_tensor(result).to(want.device), theirs, want
        found = testing.compare(f"tensor of shape {tuple(want.shape)}", [tensors], theirs.dtype, **rule)
        if not found.ok:
            raise WrongNumbersError(f"nothing is timed: {found}")
        worst = max(worst, found.error / found.limit if found.limit else 0.0)
    return worst


class GruCase:
    """A problem with its numbers: ``gru`` (torch's), ``x``, and ``grad``, the gradient of the output."""

    def __init__(self, problem: Problem, device: str = "cpu", dtype: str = "float32") -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
        self.gru = nn.GRU(problem.I, problem.H, **options)
        self.x = torch.randn(problem.T, problem.B, problem.I, generator=generator).to(**options)
        self.grad = torch.randn(problem.T, problem.B, problem.H, generator=generator).to(**options)

    @functools.cached_property
    def _exact(self) -> nn.GRU:
        exact = nn.GRU(self.gru.input_size, self.gru.hidden_size, dtype=torch.float64, device=self.x.device)
        exact.load_state_dict(self.gru.state_dict())
        return exact

    @functools.cached_property
    def _outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            return [self.gru(self.x)[0]], [self._exact(self.x.double())[0]]

    @functools.cached_property
    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        theirs, exact = (
            training_step(self.gru, self.x, self.grad),
            training_step(self._exact, self.x.double(), self.grad.double()),
        )
        return list(theirs()), list(exact())

    def check(self, peer: str, function: Callable[[], Any]) -> float:
        """:func:`compare` for the output that ``function`` returns."""
        return compare([function()], *self._outputs, ours=peer.startswith("fastgru"), multiple=2)

    def check_gradients(self, peer: str, step: Callable[[], Any]) -> float:
        """:func:`compare` for the gradients of input and weights that ``step`` returns."""
        return compare(as_torch(peer, step()), *self._gradients, ours=peer.startswith("fastgru"), multiple=2)


class AttentionCase:
    """q, k and v, and ``grad``, the gradient of the output."""

    def __init__(self, shape: Attention, device: str = "cpu", dtype: str = "float32") -> None:
        generator = torch.Generator().manual_seed(0)
        B, H, Lq, Lk, D = shape
        sizes = [(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D), (B, H, Lq, D)]
        *inputs, self.grad = (
            torch.randn(size, generator=generator).to(device, getattr(torch, dtype)) for size in sizes
        )
        self.inputs = tuple(inputs)

    @functools.cached_property
    def _checked(self) -> int:
        """Rows of the batch that are compared: all, or one where the exact scores would take gigabytes."""
        B, H, Lq, _ = self.grad.shape
        return B if B * H * Lq * self.inputs[1].size(2) <= 2**27 else 1

    @functools.cached_property
    def _results(self) -> tuple[tuple[Tensor, ...], ...]:
        """Output and gradients, torch's own and exact."""
        results = []
        for dtype in (self.grad.dtype, torch.float64):
            inputs = tuple(t[: self._checked].to(dtype).requires_grad_() for t in self.inputs)
            output = F.scaled_dot_product_attention(*inputs)
            grads = torch.autograd.grad(output, inputs, self.grad[: self._checked].to(dtype))
            results.append((output.detach(), *grads))
        return tuple(results)

    def check(self, peer: str, function: Callable[[], Any]) -> float:
        """:func:`compare` for the output that ``function`` returns."""
        theirs, exact = self._results
        got = [function()[: self._checked]]
        return compare(got, theirs[:1], exact[:1], ours=peer == "fastgru", multiple=2)

    def check_gradients(self, peer: str, step: Callable[[], Any]) -> float:
        """:func:`compare` for the gradients of q, k and v that ``step`` returns."""
        theirs, exact = self._results
        got = [grad[: self._checked] for grad in step()]
        return compare(got, theirs[1:], exact[1:], ours=peer == "fastgru", multiple=3)


gru_case = functools.lru_cache(1)(GruCase)
attention_case = functools.lru_cache(1)(AttentionCase)
