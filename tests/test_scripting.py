"""TorchScript: modules that are annotated and called as PyTorch's own tests of it do."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastgru

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


class PackedGRU(torch.jit.ScriptModule):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = rnn.GRU(5, 5)

    @torch.jit.script_method
    def forward(self, input: PackedSequence) -> tuple[PackedSequence, Tensor]:
        return self.x(input)


class TensorGRU(torch.jit.ScriptModule):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = rnn.GRU(5, 5, 2, bidirectional=True)

    @torch.jit.script_method
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.x(input)


class Cell(torch.jit.ScriptModule):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = rnn.GRUCell(5, 5)

    @torch.jit.script_method
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.x(input, hx)


class Attention(torch.jit.ScriptModule):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = rnn.MultiheadAttention(5, 5)

    @torch.jit.script_method
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.x(input, input, input)


class Nested(torch.jit.ScriptModule):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = nn.ModuleList([nn.Sequential(rnn.GRU(5, 5))])

    @torch.jit.script_method
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[0](input)


class PlainPacked(nn.Module):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = rnn.GRU(5, 5)

    def forward(self, input: PackedSequence) -> tuple[PackedSequence, Tensor]:
        return self.x(input)  # type: ignore[no-any-return]


class Exporting(nn.Module):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = rnn.GRU(5, 5)
        self.attention = rnn.MultiheadAttention(5, 5)

    @torch.jit.export
    def other(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        return self.x.forward(input, hx)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        hx = torch.zeros(self.x.num_layers, input.size(1), self.x.hidden_size)
        output, h_n = self.other(input, hx)
        return self.attention(output, output, output)[0], h_n


class Stack(nn.Module):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.x = nn.ModuleList([rnn.GRU(5, 5), rnn.GRU(5, 5)])

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.x:
            input, _ = layer(input)
        return input


def values(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part if isinstance(part, Tensor) else part.data for part in parts if part is not None]


@pytest.mark.parametrize(
    "kind",
    [PackedGRU, TensorGRU, Cell, Attention, Nested, PlainPacked, Exporting, Stack],
    ids=lambda kind: kind.__name__,
)
def test_scripted_as_torchs_own(kind: Any) -> None:
    torch.manual_seed(1)
    theirs = kind(nn)
    torch.manual_seed(1)
    ours = kind(fastgru)
    x: Any = torch.randn(3, 2, 5)
    if "Packed" in kind.__name__:
        x = pack_sequence([torch.randn(n, 5) for n in (4, 2)])
    elif kind is Cell:
        x = x[0]
    want = values(theirs(x))
    scripted = ours if isinstance(ours, torch.jit.ScriptModule) else torch.jit.script(copy.deepcopy(ours))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    for module in (scripted, torch.jit.load(buffer)):
        torch.testing.assert_close(values(module(x)), want)
    assert list(scripted.state_dict()) == list(theirs.state_dict())


def test_traced_beside_exported_methods() -> None:
    model = Exporting(fastgru)
    x = torch.randn(3, 2, 5)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fastgru.GRU(5, 5)

        @torch.jit.export
        def double(self, x: Tensor) -> Tensor:
            return 2 * x

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    other = Other()
    traced = torch.jit.trace(other, (x,))
    longer = torch.randn(4, 3, 5)
    torch.testing.assert_close(traced(longer), other(longer))
    assert torch.equal(traced.double(x), 2 * x)
    assert model(x)[0].shape == x.shape


def test_scripted_models_of_this_package() -> None:
    tokens = torch.randint(5, (3, 2))
    for kind in (fastgru.Encoder, fastgru.Decoder):
        model = kind(5, 4, 3)
        want = model(tokens)
        torch.testing.assert_close(torch.jit.script(model)(tokens), want)
    layer = fastgru.convert(nn.TransformerEncoderLayer(6, 2, 7).eval())
    x = torch.randn(3, 2, 6)
    want = layer(x)
    torch.testing.assert_close(torch.jit.script(layer)(x), want)
    with pytest.raises(RuntimeError, match=r"cannot compile fastgru\.AttentionDecoder: use torch\.jit\.trace"):
        torch.jit.script(fastgru.AttentionDecoder(5, 4, 3))


@pytest.mark.parametrize("base", [fastgru.GRU, fastgru.GRUCell, fastgru.MultiheadAttention], ids=lambda c: c.__name__)
def test_subclasses_are_refused_by_name(base: Any) -> None:
    mine = type("Mine", (base,), {})
    for make in (
        lambda: torch.jit.script(nn.Sequential(mine(6, 6))),
        lambda: setattr(torch.jit.ScriptModule(), "x", mine(6, 6)),
    ):
        with pytest.raises(RuntimeError, match=r"cannot compile Mine, .*fastgru\.revert"):
            make()
