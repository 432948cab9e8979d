"""The numeric rule: how large an error may be against a reference in float64.

Against torch's own operator in float64 on the same (rounded) numbers, the largest error may be at most twice that of
torch's operator in the problem's dtype, plus a floor of 4 eps times the largest reference value. In float64 nothing
more exact is at hand: torch's error is then taken from float32, scaled by the ratio of the epsilons, and counts once
more, for the reference itself. "Largest" is over the tensor and, where that holds a few numbers only, over several
draws of the problem: one number's rounding is luck.

A comparison that needs another multiple or floor names it at its call, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: How many times torch's own error is allowed.
MULTIPLE = 2.0
#: What is allowed where torch happens to be exact, in eps of the largest value.
FLOOR = 4.0


@dataclass(frozen=True)
class Comparison:
    """One tensor under the rule."""

    name: str
    error: float
    limit: float
    torch_error: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        return f"{self.name}: error {self.error:.3g}, limit {self.limit:.3g}, torch {self.torch_error:.3g}: {verdict}"


def error_limit(
    torch_error: float, magnitude: float, dtype: torch.dtype, *, multiple: float = MULTIPLE, floor: float = FLOOR
) -> float:
    """The largest error that the rule allows.

    Args:
        torch_error: the largest error of torch's operator in ``dtype``; for float64, in float32.
        magnitude: the largest reference value.
        dtype: that of the problem.
        multiple: how many times ``torch_error`` is allowed.
        floor: what is allowed beyond it, in eps of ``magnitude``.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        torch_error *= eps / torch.finfo(torch.float32).eps
        multiple += 1
    return multiple * torch_error + floor * eps * magnitude


def compare(
    name: str,
    draws: Sequence[tuple[Tensor, Tensor, Tensor]],
    dtype: torch.dtype,
    *,
    multiple: float = MULTIPLE,
    floor: float = FLOOR,
    magnitude: float = 0.0,
) -> Comparison:
    """One tensor of every draw of a problem under the rule.

    An infinity of the reference has to be the same infinity in ours, and is left out of the errors.

    Args:
        draws: ours, torch's and the reference, of equal shapes, on one device.
        magnitude: the size of the terms that the values are differences of, where that exceeds the largest reference
            value.
        name, dtype, multiple, floor: as in :class:`Comparison` and :func:`error_limit`.
    """
    error = torch_error = 0.0
    for ours, theirs, reference in draws:
        assert ours.shape == theirs.shape == reference.shape, name
        if reference.numel() == 0:
            continue
        want = reference.double()
        infinite = want.isinf()
        same = torch.equal(ours.isinf(), infinite) and torch.equal(ours[infinite].sign(), want[infinite].sign())

        def largest(tensor: Tensor, infinite: Tensor = infinite) -> float:
            return tensor.double().masked_fill(infinite, 0).abs().max().item()

        found = largest(ours.double() - want) if same else float("nan")
        # Not max(), which would drop a NaN.
        error = found if found > error or found != found else error
        torch_error = max(torch_error, largest(theirs.double() - want))
        magnitude = max(magnitude, largest(want))
    return Comparison(
        name, error, error_limit(torch_error, magnitude, dtype, multiple=multiple, floor=floor), torch_error
    )


def failures(comparisons: Iterable[Comparison]) -> list[str]:
    """What breaks the rule, one line per tensor."""
    return [str(comparison) for comparison in comparisons if not comparison.ok]
