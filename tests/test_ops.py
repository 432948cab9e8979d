"""torch.library.opcheck on every operator, and what the operators promise beyond it."""

from __future__ import annotations

from typing import Any

import gru_operators
import pytest
import torch
from gru_operators import layer

from fastgru.ops.gru.schema import GRU_OPS

CASES = [
    {"packed": packed, "bidirectional": bidirectional, "bias": bias}
    for packed, bidirectional, bias in [
        (False, False, True),
        (False, True, False),
        (True, False, False),
        (True, True, True),
    ]
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["infer", "train"])
def test_opcheck_forward(backend: str, kind: str, case: dict[str, bool], requires_grad: bool) -> None:
    torch.library.opcheck(getattr(GRU_OPS[backend], kind), tuple(layer(**case, requires_grad=requires_grad)))


def backward_arguments(backend: str, case: dict[str, bool], requires_grad: bool) -> list[Any]:
    return gru_operators.backward_arguments(GRU_OPS[backend], layer(**case, requires_grad=requires_grad), requires_grad)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_backward(backend: str, case: dict[str, bool], needs: tuple[bool, bool]) -> None:
    torch.library.opcheck(GRU_OPS[backend].backward, (*backward_arguments(backend, case, False), *needs))


@pytest.mark.parametrize("case", [case for case in CASES if not case["packed"]], ids=str)
def test_opcheck_double_backward(backend: str, case: dict[str, bool]) -> None:
    # Not packed: tracing the composite would need the numbers in batch_sizes.
    torch.library.opcheck(GRU_OPS[backend].backward, (*backward_arguments(backend, case, True), True, True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_recomputes_the_gates(engine: str, case: dict[str, bool]) -> None:
    backend = engine.partition("-")[0]
    arguments = backward_arguments(backend, case, False)
    want = GRU_OPS[backend].backward(*arguments, True, True)
    got = GRU_OPS[backend].backward(*arguments[:-1], None, True, True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("absent", [0, 1], ids=["grad_output", "grad_h_n"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_absent_gradient_is_zero(engine: str, case: dict[str, bool], absent: int) -> None:
    backend = engine.partition("-")[0]
    arguments = backward_arguments(backend, case, False)
    with_none = list(arguments)
    with_none[absent] = None
    arguments[absent] = torch.zeros_like(arguments[absent])
    got = GRU_OPS[backend].backward(*with_none, True, True)
    torch.testing.assert_close(got, GRU_OPS[backend].backward(*arguments, True, True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infer_equals_train_bitwise(engine: str, case: dict[str, bool]) -> None:
    ops = GRU_OPS[engine.partition("-")[0]]
    arguments = layer(**case)
    for a, b in zip(ops.infer(*arguments), ops.train(*arguments)[:2], strict=True):
        assert torch.equal(a, b)
