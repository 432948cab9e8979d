"""torch.compile without a graph break. Compilation is slow, so one test holds many features."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastgru


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("save_gates", [False, True])
def test_module_forward_and_backward(backend: str, save_gates: bool) -> None:
    module = fastgru.GRU(3, 4, 2, bidirectional=True, batch_first=True, save_gates=save_gates)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, requires_grad=True)
    leaves = [x, *module.parameters()]
    grads = []
    for run in (compiled, module):
        output, h_n = run(x)
        grads.append([output, h_n, *torch.autograd.grad(output.sin().sum() + h_n.sum(), leaves)])
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_inductor_and_a_new_length(backend: str) -> None:
    module = fastgru.GRU(3, 4)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (5, 9, 17):
            x = torch.randn(length, 2, 3)
            torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("with_hx", [False, True])
def test_packed(backend: str, with_hx: bool) -> None:
    module = fastgru.GRU(3, 4)
    packed = pack_sequence([torch.randn(5, 3), torch.randn(3, 3)])
    hx = torch.randn(1, 2, 4) if with_hx else None

    def run(data: Tensor, batch_sizes: Tensor) -> Tensor:
        return module(PackedSequence(data, batch_sizes), hx)[0].data

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(packed.data, packed.batch_sizes), run(packed.data, packed.batch_sizes))


def test_cell_autocast_and_dropout(backend: str) -> None:
    cell = fastgru.GRUCell(3, 4)
    module = fastgru.GRU(3, 4, 2, dropout=0.5).eval()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = module(x)
        return cell(x[0]) + output[-1]

    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_a_new_choice_of_backend_compiles_anew() -> None:
    module = fastgru.GRU(3, 4)
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=record)
    x = torch.randn(5, 2, 3)
    compiled(x)
    with fastgru.use_backend("reference"):
        compiled(x)
    assert "reference_gru_train" in graphs[-1]


def test_export(backend: str) -> None:
    module = fastgru.GRU(3, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 3)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))
