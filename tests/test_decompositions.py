"""An exported program in torch's operators alone, for tools that know no others."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastgru


def decomposed(model: nn.Module, arguments: tuple[Any, ...], whole: bool = False, **options: Any) -> Any:
    table = torch.export.default_decompositions()
    table.update(fastgru.decompositions())
    if whole:
        table.pop(torch.ops.aten.gru.input)
    return torch.export.export(model, arguments, **options).run_decompositions(table)


def operators(program: Any) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def foreign(program: Any) -> list[str]:
    return [name for name in operators(program) if "fastgru" in name]


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")  # of nn.GRU, when it is exported
@pytest.mark.parametrize("trains", [True, False], ids=["training", "no gradient"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}], ids=str
)
def test_a_gru_is_the_program_that_torchs_is(backend: str, options: dict[str, Any], trains: bool) -> None:
    theirs = nn.GRU(3, 4, **options).requires_grad_(trains)
    ours = fastgru.convert(copy.deepcopy(theirs))
    x = torch.randn(5, 2, 3)
    program = decomposed(ours, (x,))
    want = torch.export.export(theirs, (x,)).run_decompositions(torch.export.default_decompositions())
    # Each layer of ours has its own slice of the initial state.
    assert set(operators(program)) == set(operators(want))
    assert operators(program)["aten.addmm.default"] == operators(want)["aten.addmm.default"]
    torch.testing.assert_close(program.module()(x), theirs(x))
    whole = decomposed(ours, (x,), whole=True)
    assert operators(whole)["aten.gru.input"] == ours.num_layers
    assert foreign(whole) == []
    torch.testing.assert_close(whole.module()(x), theirs(x))


ATTENTION: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "plain": (fastgru.flash_attention, tuple(torch.randn(2, 4, n, 8) for n in (5, 7, 7))),
    "everything": (
        lambda q, k, lengths, bias: fastgru.flash_attention(
            q,
            k,
            k,
            bias=bias,
            k_lengths=lengths,
            causal=True,
            softcap=3.0,
            enable_gqa=True,
            window=(3, 0),
            alibi_slopes=torch.ones(4),
            return_lse=True,
        ),
        (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.tensor([3, 7]), torch.randn(5, 7)),
    ),
    "additive": (
        lambda q, k, w, lengths: fastgru.additive_attention(q, k, k, w, k_lengths=lengths),
        (torch.randn(2, 4, 8), torch.randn(2, 7, 8), torch.randn(8), torch.tensor([3, 0])),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(backend: str, name: str) -> None:
    function, arguments = ATTENTION[name]
    # Additive attention is the reference backend's alone.
    with fastgru.use_backend("auto" if name == "additive" else backend):
        program = decomposed(Call(function), arguments)
        assert foreign(program) == []
        torch.testing.assert_close(program.module()(*arguments), function(*arguments))


def test_models(backend: str) -> None:
    encoder, decoder = fastgru.Encoder(5, 3, 4), fastgru.AttentionDecoder(5, 3, 4)
    attention = fastgru.MultiheadAttention(8, 2, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.cell = encoder, decoder, fastgru.GRUCell(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            output, hidden = self.encoder(tokens)
            logits, hidden = self.decoder(tokens, hidden, output)
            return logits.sum() + self.cell(hidden[0])

    tokens = torch.randint(5, (6, 2))
    program = decomposed(Model(), (tokens,))
    assert foreign(program) == []

    masked = Call(lambda x, hidden: attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0])
    masked.attention = attention
    batch, length = torch.export.Dim("B", min=2), torch.export.Dim("L", min=2)
    shapes = (({0: batch, 1: length}, {0: batch, 1: length}),)
    program = decomposed(masked, (torch.randn(2, 5, 8), torch.rand(2, 5) < 0.3), dynamic_shapes=shapes)
    assert foreign(program) == []
    arguments = torch.randn(3, 9, 8), torch.rand(3, 9) < 0.3
    torch.testing.assert_close(program.module()(*arguments), masked(*arguments))


def test_what_stays_is_right() -> None:
    rnn = fastgru.GRU(3, 4)
    padded = Call(lambda x, lengths: rnn(x, lengths=lengths))
    padded.rnn = rnn
    arguments = torch.randn(5, 2, 3), torch.tensor([2, 5])
    program = decomposed(padded, arguments)
    assert any("fastgru" in name for name in operators(program))
    torch.testing.assert_close(program.module()(*arguments), padded(*arguments))


def test_backward_passes_are_right_or_refused() -> None:
    def gradients(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastgru.flash_attention(q, k, k, causal=True).square().sum(), (q, k))

    q, k = (torch.randn(2, 2, n, 4, requires_grad=True) for n in (5, 6))
    graph = make_fx(gradients, decomposition_table=fastgru.decompositions())(q, k)
    torch.testing.assert_close(graph(q, k), gradients(q, k))

    rnn, x = fastgru.GRU(3, 4).requires_grad_(False), torch.randn(5, 2, 3, requires_grad=True)
    for backend in ("reference", "cpu") if fastgru._library.load_error is None else ("reference",):
        with fastgru.use_backend(backend), pytest.raises(RuntimeError):
            make_fx(lambda x: torch.autograd.grad(rnn(x)[0].sum(), x), decomposition_table=fastgru.decompositions())(x)
