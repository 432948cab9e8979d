"""nn.GRU's own kernels behind our operators. They are the same code on the CPU but for the library that computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastgru
from fastgru.backends import measured, registry
from fastgru.ops.gru.eager import KeptGraphFunction
from fastgru.ops.gru.schema import GRU_OPS

CASES = [
    (packed, bidirectional, bias) for packed in (False, True) for bidirectional, bias in ((True, True), (False, False))
]


def layer(packed: bool, bidirectional: bool, bias: bool, requires_grad: bool = False) -> list[Tensor | None]:
    """The arguments of a forward operator."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)

    weights: list[Tensor | None] = []
    for _ in range(2 if bidirectional else 1):
        weights += [draw(21, 5), draw(21, 7), *([draw(21), draw(21)] if bias else [None, None])]
    weights += [None] * (8 - len(weights))
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    return [draw(8, 5) if packed else draw(4, 3, 5), draw(2 if bidirectional else 1, 3, 7), *weights, sizes]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestOperators:
    def test_opcheck(self, case: tuple[bool, bool, bool]) -> None:
        ops = GRU_OPS["cudnn"]
        arguments = layer(*case)
        output, h_n, gates = ops.train(*arguments)
        torch.library.opcheck(ops.infer, tuple(arguments))
        torch.library.opcheck(ops.train, tuple(layer(*case, requires_grad=True)))
        for needs in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(ops.backward, (output, h_n, *arguments, output, gates, *needs))

    @pytest.mark.parametrize("absent", [None, 0, 1])
    def test_numbers_of_the_reference(self, case: tuple[bool, bool, bool], absent: int | None) -> None:
        ours, reference = GRU_OPS["cudnn"], GRU_OPS["reference"]
        arguments = layer(*case)
        output, h_n, gates = ours.train(*arguments)
        want = reference.train(*arguments)
        torch.testing.assert_close((output, h_n), want[:2])
        seeds = [None if absent == i else torch.randn_like(t) for i, t in enumerate((output, h_n))]
        got = ours.backward(*seeds, *arguments, output, gates, True, True)
        wanted = reference.backward(*seeds, *arguments, *want[::2], True, True)
        # Without biases nobody reads their gradients.
        present = slice(None) if case[2] else slice(4)
        torch.testing.assert_close(got[present], wanted[present])

    def test_kept_graph(self, case: tuple[bool, bool, bool]) -> None:
        arguments = layer(*case, requires_grad=True)
        leaves = [t for t in arguments[:-1] if t is not None]

        def derivatives(run: Callable[[], tuple[Tensor, Tensor]]) -> Any:
            output, h_n = run()
            loss = output.sin().sum() + h_n.cos().sum()
            plain = torch.autograd.grad(loss, leaves, retain_graph=True)
            again = torch.autograd.grad(loss, leaves, create_graph=True)
            return plain, again, torch.autograd.grad(sum(g.sin().sum() for g in again), leaves)

        torch.testing.assert_close(
            derivatives(lambda: KeptGraphFunction.apply(GRU_OPS["cudnn"], *arguments)),
            derivatives(lambda: GRU_OPS["reference"].train(*arguments)[:2]),
        )


@pytest.mark.parametrize("missing", [(4,), (5,), (4, 8), (9,), (4, 5, 8)], ids=str)
def test_a_missing_bias_is_zero(missing: tuple[int, ...]) -> None:
    ops = GRU_OPS["cudnn"]
    arguments = layer(False, True, True)
    zeros = list(arguments)
    for i in missing:
        arguments[i], zeros[i] = None, torch.zeros(21, dtype=torch.float64)
    results = []
    for given in (arguments, zeros):
        output, h_n, gates = ops.train(*given)
        results.append((output, h_n, *ops.backward(output, h_n, *given, output, gates, True, True)[:4]))
    torch.testing.assert_close(results[0], results[1])


def test_results_may_be_overwritten() -> None:
    arguments = layer(False, True, True, requires_grad=True)
    leaves = [t for t in arguments[:-1] if t is not None]
    results = []
    for in_place in (False, True):
        output, h_n = KeptGraphFunction.apply(GRU_OPS["cudnn"], *arguments)
        output = output.mul_(2) if in_place else output * 2
        h_n = h_n.mul_(2) if in_place else h_n * 2
        loss = output.square().sum() + h_n.sum()
        for _ in range(2):
            results.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_derivatives_of_the_module(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """As on a GPU, but that torch's operator is ATen's here."""
    anywhere = dataclasses.replace(
        registry._backends["cudnn"], devices=("*",), available=lambda: None, supports=lambda device, dtype: None
    )
    monkeypatch.setitem(registry._backends, "cudnn", anywhere)
    module = fastgru.GRU(3, 2, dtype=torch.float64, **options).eval()
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    leaves = [torch.randn(3, 2, 3, dtype=torch.float64), *(p.detach().clone() for p in module.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with fastgru.use_backend("cudnn"):
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)
        assert gradcheck(lambda x: module(x)[0], leaves[:1], check_batched_grad=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_why_it_cannot_run_and_the_remedy() -> None:
    with pytest.raises(
        fastgru.BackendUnavailable, match=r"backend 'cudnn' cannot run: torch finds no usable GPU; check"
    ):
        fastgru.use_backend("cudnn")


SIZES = registry.Sizes(hidden=256, batch=32, steps=512, directions=1, training=True, packed=False)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in which Triton wins H = 256 and loses H = 1024, and cuda does not take either."""
    rows = [[256, 32, 512, 1, True, False, None, 1.0, 2.0], [1024, 32, 512, 1, True, False, None, 2.0, 1.0]]
    monkeypatch.setattr(measured, "_measured", lambda: {"sm_90": {"bfloat16": rows}})
    measured.ahead.cache_clear()


@pytest.mark.parametrize(
    "change, wins",
    [
        ({}, True),
        ({"hidden": 384}, True),
        ({"hidden": 768}, False),
        ({"hidden": 1024}, False),
        ({"hidden": 100}, False),
        ({"batch": 64}, True),
        ({"batch": 65}, False),
        ({"steps": 200}, False),
        ({"training": False}, False),
        ({"packed": True}, False),
        ({"directions": 2}, False),
        ({"batch": 0}, False),
    ],
    ids=str,
)
def test_table_takes_the_nearest_measurement_within_reach(table: None, change: dict[str, int], wins: bool) -> None:
    assert measured.ahead("triton", "sm_90", "bfloat16", SIZES._replace(**change)) is wins


def test_table_without_sizes_goes_by_the_majority(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not measured.ahead("triton", "sm_90", "bfloat16", None)
    rows = measured._measured()["sm_90"]["bfloat16"]
    monkeypatch.setattr(measured, "_measured", lambda: {"sm_90": {"bfloat16": rows[:1]}})
    measured.ahead.cache_clear()
    assert measured.ahead("triton", "sm_90", "bfloat16", None)
    assert not measured.ahead("triton", "sm_80", "bfloat16", None)


def test_table_knows_nothing_of_other_machines(table: None) -> None:
    assert not measured.ahead("triton", "sm_80", "bfloat16", SIZES)
    assert not measured.ahead("triton", "sm_90", "float16", SIZES)
    assert not measured.ahead("triton", "sm_90", None, SIZES)


def test_table_ranks_three_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {16: (1.0, 2.0, 3.0), 64: (2.0, 1.0, 3.0), 256: (2.0, 3.0, 1.0), 1024: (2.0, None, 3.0)}
    rows = [[hidden, 32, 512, 1, True, False, *row] for hidden, row in times.items()]
    monkeypatch.setattr(measured, "_measured", lambda: {"sm_90": {"bfloat16": rows}})
    measured.ahead.cache_clear()
    ahead = [
        [measured.ahead(name, "sm_90", "bfloat16", SIZES._replace(hidden=hidden)) for name in ("cuda", "triton")]
        for hidden in times
    ]
    assert ahead == [[True, True], [False, True], [False, False], [True, False]]
    # Two cards of one architecture that do not agree.
    rows.append([16, 32, 512, 1, True, False, 3.0, 2.0, 4.0])
    measured.ahead.cache_clear()
    assert not measured.ahead("cuda", "sm_90", "bfloat16", SIZES._replace(hidden=16))
    assert measured.ahead("triton", "sm_90", "bfloat16", SIZES._replace(hidden=16))


def test_auto_passes_over_a_winner_that_refuses_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    best = registry.Backend(
        name="best", devices=("cpu",), priority=999, available=lambda: None, supports=lambda device, dtype: None
    )
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_implementations", dict(registry._implementations))
    monkeypatch.setattr(registry, "_warned", set())
    registry.register(best)
    how = registry.Implementation(
        wins=lambda device, dtype, sizes: True,
        refuses=lambda device, dtype, sizes: "H is too large" if sizes.hidden > 100 else None,
    )
    registry.implement("gru", "best", how)
    place = torch.device("cpu"), torch.float64
    try:
        with fastgru.use_backend("auto"):
            assert registry.fastest("gru", *place, SIZES._replace(hidden=1)).name == "best"
            with pytest.warns(RuntimeWarning, match="because best: H is too large"):
                assert registry.fastest("gru", *place, SIZES).name != "best"
            assert registry.fastest("gru", *place, SIZES).name != "best"  # and says so once
    finally:
        monkeypatch.undo()
        registry.forget()


def test_shipped_table_is_sound() -> None:
    for table in measured._measured.__wrapped__().values():
        for rows in table.values():
            assert rows
            assert all(len(row) == 9 and all(time is None or time > 0 for time in row[6:]) for row in rows)


def test_precision_compares_like_with_like() -> None:
    assert measured.precision(torch.bfloat16) == "bfloat16"
    matmul, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = matmul.fp32_precision, rnn.fp32_precision
    try:
        for ours, theirs, name in (("ieee", "ieee", "float32"), ("tf32", "tf32", "tf32"), ("ieee", "tf32", None)):
            matmul.fp32_precision, rnn.fp32_precision = ours, theirs
            assert measured.precision(torch.float32) == name
    finally:
        matmul.fp32_precision, rnn.fp32_precision = before


def test_auto_passes_over_a_backend_that_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    best = registry.Backend(
        name="best", devices=("cpu",), priority=999, available=lambda: None, supports=lambda device, dtype: None
    )
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_implementations", dict(registry._implementations))
    registry.register(best)
    wins = registry.Implementation(wins=lambda device, dtype, sizes: sizes is not None and sizes.hidden > 100)
    registry.implement("gru", "best", wins)
    place = torch.device("cpu"), torch.float64
    try:
        with fastgru.use_backend("auto"):
            usual = registry.fastest("gru", *place, SIZES._replace(hidden=1))
            assert usual.name != "best"
            assert registry.fastest("gru", *place, SIZES).name == "best"
            assert "best: chosen for the sizes at which it was measured to be faster" in fastgru.explain(*place)
            assert f"{usual.name}: chosen for all others" in fastgru.explain(*place)
            module = fastgru.GRU(2, 3, dtype=torch.float64)
            x = torch.randn(4, 1, 2, dtype=torch.float64)
            want = module(x)
            torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), want)
        with fastgru.use_backend("best"):
            assert registry.fastest("gru", *place, SIZES._replace(hidden=1)).name == "best"
    finally:
        monkeypatch.undo()
        registry.forget()
