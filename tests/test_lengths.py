"""Padded input with lengths, jagged tensors and resets, against nn.GRU run sequence by sequence."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

import fastgru

T, B, I, H = 6, 4, 3, 5
LENGTHS = [3, 6, 0, 4]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
]


def pair(**options: Any) -> tuple[nn.GRU, fastgru.GRU]:
    theirs = nn.GRU(I, H, dtype=torch.float64, **options)
    ours = fastgru.GRU(I, H, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def resets() -> Tensor:
    """At the first step, at the last, at neighbours, beyond a length, and nowhere."""
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[0, 0] = mask[2, 0] = mask[5, 1] = mask[3, 3] = mask[2, 3] = mask[5, 3] = mask[1, 2] = True
    return mask


def row_by_row(module: nn.GRU, x: Tensor, hx: Tensor, lengths: list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, B, I], hx, and the result as time-major. Each part between resets is a call of its own."""
    directions = 2 if module.bidirectional else 1
    outputs, states = [], []
    for b, length in enumerate(lengths):
        inner = [t for t in range(1, length) if mask[t, b]]
        bounds = [0, *inner, length] if length else []
        pieces = list(pairwise(bounds))
        state = hx[:, b].clone()
        row = [torch.zeros(T - length, directions * H, dtype=x.dtype)]
        for index, (start, end) in enumerate(pieces):
            begin = torch.zeros_like(state)
            if index == 0 and not mask[0, b]:
                begin[::directions] = hx[::directions, b]
            if directions == 2 and index == len(pieces) - 1:
                begin[1::2] = hx[1::2, b]
            part = x[start:end, b : b + 1].transpose(0, 1) if module.batch_first else x[start:end, b : b + 1]
            output, h_n = module(part, begin.unsqueeze(1))
            row.insert(-1, output.reshape(end - start, directions * H))
            if index == len(pieces) - 1:
                state = state.clone()
                state[::directions] = h_n[::directions, 0]
            if directions == 2 and index == 0:
                state = state.clone()
                state[1::2] = h_n[1::2, 0]
        outputs.append(torch.cat(row))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


CASES: dict[str, tuple[list[int] | None, Callable[[], Tensor] | None]] = {
    "lengths": (LENGTHS, None),
    "resets": (None, resets),
    "both": (LENGTHS, resets),
    "a reset at every step": (None, lambda: torch.ones(T, B, dtype=torch.bool)),
    "no reset at all": (None, lambda: torch.zeros(T, B, dtype=torch.bool)),
    "no step at all": ([0, 0, 0, 0], None),
}


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_and_gradients(backend: str, options: dict[str, Any], name: str, with_hx: bool) -> None:
    theirs, ours = pair(**options)
    lengths, make = CASES[name]
    mask = None if make is None else make()
    layers = ours.num_layers * (2 if ours.bidirectional else 1)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(layers, B, H, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(hx)
    nowhere = torch.zeros(T, B, dtype=torch.bool)
    want = row_by_row(theirs, x, hx if with_hx else zeros, lengths or [T] * B, nowhere if mask is None else mask)
    if ours.batch_first:
        mask = None if mask is None else mask.t()
        output, h_n = ours(x.transpose(0, 1), hx if with_hx else None, lengths=lengths, reset_mask=mask)
        got = output.transpose(0, 1), h_n
    else:
        got = ours(x, hx if with_hx else None, lengths=lengths, reset_mask=mask)
    torch.testing.assert_close(got, want)
    if name == "no step at all":
        return
    seeds = [torch.randn_like(t) for t in want]
    leaves = [x, hx] if with_hx else [x]
    torch.testing.assert_close(
        torch.autograd.grad(got, [*leaves, *ours.parameters()], seeds),
        torch.autograd.grad(want, [*leaves, *theirs.parameters()], seeds),
    )


def test_a_reset_stops_what_is_infinite(backend: str) -> None:
    _, ours = pair()
    hx = torch.full((1, B, H), float("inf"), dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[0] = True
    torch.testing.assert_close(ours(x, hx, reset_mask=mask), ours(x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, None], ids=str)
def test_lengths_as_a_tensor_or_a_list(dtype: torch.dtype | None) -> None:
    _, ours = pair()
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = LENGTHS if dtype is None else torch.tensor(LENGTHS, dtype=dtype)
    output, _ = ours(x, lengths=lengths)
    for b, length in enumerate(LENGTHS):
        assert not output[length:, b].any()
        assert output[:length, b].all()


def test_what_is_padded_is_not_read(backend: str) -> None:
    _, ours = pair(bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    poisoned = x.clone()
    for b, length in enumerate(LENGTHS):
        poisoned[length:, b] = float("nan")
    torch.testing.assert_close(ours(poisoned, lengths=LENGTHS), ours(x, lengths=LENGTHS))


def test_unbatched_resets() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(T, I, dtype=torch.float64)
    mask = resets()[:, 0]
    output, h_n = ours(x, reset_mask=mask)
    first, _ = theirs(x[:2])
    second, last = theirs(x[2:])
    torch.testing.assert_close(output, torch.cat([first, second]))
    torch.testing.assert_close(h_n, last)


def test_the_default_device_is_not_asked() -> None:
    _, ours = pair()
    x = torch.randn(T, B, I, dtype=torch.float64)
    mask = resets()
    want = ours(x, lengths=LENGTHS, reset_mask=mask), ours(x, reset_mask=mask)
    hx = torch.zeros(1, B, H, dtype=torch.float64)
    with torch.device("meta"):
        torch.testing.assert_close((ours(x, hx, lengths=LENGTHS, reset_mask=mask), ours(x, hx, reset_mask=mask)), want)


def test_one_node_of_torch_fx() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fastgru.GRU(I, H)

        def forward(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
            return self.rnn(x, lengths=lengths, reset_mask=mask)[0]

    model, arguments = Model(), (torch.randn(T, B, I), torch.tensor(LENGTHS), resets())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["rnn"]
    assert torch.equal(traced(*arguments), model(*arguments))


class Padded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = fastgru.GRU(I, H, **options)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = self.rnn(x, lengths=lengths, reset_mask=mask)
        return output


def padded(steps: int, lengths: list[int], batch_first: bool = False, resets: bool = False) -> tuple[Tensor, ...]:
    """Arguments for Padded."""
    arguments = torch.randn(steps, len(lengths), I), torch.tensor(lengths, dtype=torch.int64)
    if resets:
        arguments += (torch.rand(steps, len(lengths)) < 0.3,)
    return tuple(t.transpose(0, 1) if batch_first and t.dim() > 1 else t for t in arguments)


def assert_same_with_gradients(
    got_from: Callable[..., Any], want_from: nn.Module, arguments: tuple[Tensor, ...]
) -> None:
    leaves = [arguments[0].clone().requires_grad_() for _ in range(2)]
    got, want = (f(x, *arguments[1:]) for f, x in zip((got_from, want_from), leaves, strict=True))
    torch.testing.assert_close(got, want)
    if want[0].requires_grad:
        parameters = list(want_from.parameters())
        grads = (
            torch.autograd.grad(out[0].square().sum() + out[1].sum(), [x, *parameters])
            for out, x in zip((got, want), leaves, strict=True)
        )
        torch.testing.assert_close(next(grads), next(grads))


# Zero lengths, a longer longest, another batch, another order; no step at all; one row; none.
OTHERS = [(7, [3, 0, 2, 4, 7]), (4, [0, 0]), (2, [1]), (3, [])]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("resets", [False, True], ids=["lengths", "resets"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trace_serves_other_data(backend: str, options: dict[str, Any], resets: bool) -> None:
    model = Padded(**options)
    how = options.get("batch_first", False), resets
    for example in ([3, 6, 2, 4], [0, 0, 0]):
        traced = torch.jit.trace(model, padded(6, example, *how))
        for steps, lengths in OTHERS:
            assert_same_with_gradients(traced, model, padded(steps, lengths, *how))
    with pytest.raises(RuntimeError, match="lengths has to be between 0 and the 3 steps of input, got 4 at 0"):
        traced(*padded(3, [4, 1], *how))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_resets_alone_and_of_lengths_in_a_list() -> None:
    rnn = fastgru.GRU(I, H).requires_grad_(False)

    def resets_alone(x: Tensor, mask: Tensor) -> Tensor:
        return rnn(x, reset_mask=mask)[1]

    def of_a_size(x: Tensor) -> Tensor:
        return rnn(x, lengths=[x.size(0), x.size(0) - 1])[1]

    example, other = (torch.randn(n, 2, I) for n in (6, 4))
    masks = [torch.rand(n, 2) < 0.3 for n in (6, 4)]
    torch.testing.assert_close(
        torch.jit.trace(resets_alone, (example, masks[0]))(other, masks[1]), resets_alone(other, masks[1])
    )
    torch.testing.assert_close(torch.jit.trace(of_a_size, (example,))(other), rnn(other, lengths=[4, 3])[1])


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_serves_other_data(backend: str, strict: bool) -> None:
    model = Padded(num_layers=2, bidirectional=True)
    steps, batch = torch.export.Dim("T", min=2, max=99), torch.export.Dim("B", min=2, max=99)
    shapes = {0: steps, 1: batch}, {0: batch}, {0: steps, 1: batch}
    program = torch.export.export(model, padded(6, [3, 6, 0, 4], resets=True), dynamic_shapes=shapes, strict=strict)
    for steps_, lengths in OTHERS[:2]:
        assert_same_with_gradients(program.module(), model, padded(steps_, lengths, resets=True))
    with pytest.raises(ValueError, match="lengths has to be of shape"):
        torch.export.export(model, (torch.randn(4, 3, I), torch.tensor([1, 2])), strict=False)


@pytest.mark.filterwarnings("ignore")
def test_compiled_in_one_graph(backend: str) -> None:
    """Where torch is told to: the numbers of segments and of their steps are known at run time only."""
    model = Padded(bidirectional=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for steps, lengths in OTHERS[:2]:
            assert_same_with_gradients(compiled, model, padded(steps, lengths, resets=True))
    torch._dynamo.reset()
    # Else the graph breaks there.
    compiled = torch.compile(model, backend="aot_eager")
    for steps, lengths in OTHERS:
        assert_same_with_gradients(compiled, model, padded(steps, lengths))


def test_make_fx_and_the_operator() -> None:
    model = Padded().requires_grad_(False)
    x, lengths, mask = padded(6, [3, 6, 2, 4], resets=True)
    graph = make_fx(model)(x, lengths, mask)
    for other in ([6, 0, 1, 1], [0, 0, 0, 0]):
        arguments = x, torch.tensor(other), mask
        torch.testing.assert_close(graph(*arguments), model(*arguments))
    for arguments in ((x, lengths, None, mask, False), (x[0], None, torch.tensor([0, 3, 3, 4]), None, False)):
        torch.library.opcheck(torch.ops.fastgru.gru_segments.default, arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_refuses(dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"takes a fastgru\.GRU on whole batches, not on packed input, lengths, resets"):
        torch.onnx.export(Padded(), padded(6, [3, 6, 2, 4]), None if dynamo else io.BytesIO(), dynamo=dynamo)


def test_gradcheck_with_resets(backend: str) -> None:
    _, ours = pair(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(4, B, H, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *a: ours(*a, lengths=LENGTHS, reset_mask=resets()), (x, hx), fast_mode=True)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jagged(backend: str, options: dict[str, Any], holes: bool) -> None:
    theirs, ours = pair(**options)
    layers = ours.num_layers * (2 if ours.bidirectional else 1)
    sequences = [torch.randn(n, I, dtype=torch.float64) for n in (3, 1, 5)]
    hx = torch.randn(layers, 3, H, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 5])
    offsets = torch.tensor([0, 3, 4, 9])
    values = torch.cat(sequences)
    if holes:
        lengths = torch.tensor([2, 1, 3])
        sequences = [sequence[:n] for sequence, n in zip(sequences, (2, 1, 3), strict=True)]
    leaf = values.requires_grad_()
    nested = torch.nested.nested_tensor_from_jagged(leaf, offsets, lengths if holes else None)
    output, h_n = ours(nested, hx)
    assert output.is_nested
    want, want_h_n = theirs(pack_sequence(sequences, enforce_sorted=False), hx)
    rows = [output.values()[start : start + n] for start, n in zip(offsets, lengths, strict=False)]
    torch.testing.assert_close(pack_sequence(rows, enforce_sorted=False).data, want.data)
    torch.testing.assert_close(h_n, want_h_n)
    # The result goes on with what has the input's lengths.
    ((output * 2 + output).values().sum() + h_n.sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.any(dim=1).tolist() == [
        any(s <= i < s + n for s, n in zip(offsets, lengths, strict=False)) for i in range(9)
    ]


def nested(*sizes: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, I) for n in sizes], layout=torch.jagged)


X = torch.randn(T, B, I)
WRONG: dict[str, tuple[Callable[[fastgru.GRU], Any], type[Exception], str]] = {
    "negative": (
        lambda m: m(X, lengths=[1, 2, -3, 4]),
        ValueError,
        "lengths has to be between 0 and the 6 steps of input, got -3 at 2",
    ),
    "beyond T": (
        lambda m: m(X, lengths=torch.tensor([1, 7, 3, 4])),
        ValueError,
        "lengths has to be between 0 and the 6 steps of input, got 7 at 1",
    ),
    "float": (
        lambda m: m(X, lengths=torch.ones(B)),
        TypeError,
        "lengths has to be of an integer type, got torch.float32",
    ),
    "boolean": (
        lambda m: m(X, lengths=[True] * B),
        TypeError,
        "lengths has to be of an integer type, got torch.bool",
    ),
    "words": (
        lambda m: m(X, lengths=["1", "2"]),
        TypeError,
        "lengths has to be a tensor or a sequence of integers, got ['1', '2']",
    ),
    "wrong number of lengths": (
        lambda m: m(X, lengths=[1, 2]),
        ValueError,
        "lengths has to be of shape [B] = [4], got [2]",
    ),
    "lengths of one sequence": (
        lambda m: m(X[:, 0], lengths=[3]),
        ValueError,
        "lengths is for batched 3-D input, got 2-D input",
    ),
    "lengths of a packed sequence": (
        lambda m: m(pack_sequence([X[:, 0]]), lengths=[3]),
        ValueError,
        "lengths and reset_mask are for padded tensors, got a PackedSequence as input",
    ),
    "resets of a nested tensor": (
        lambda m: m(nested(2, 3), reset_mask=torch.zeros(2, 3, dtype=torch.bool)),
        ValueError,
        "lengths and reset_mask are for padded tensors, got a nested tensor as input",
    ),
    "reset_mask of integers": (
        lambda m: m(X, reset_mask=torch.zeros(T, B, dtype=torch.int64)),
        TypeError,
        "reset_mask has to be a tensor of torch.bool, got torch.int64",
    ),
    "reset_mask that is a list": (
        lambda m: m(X, reset_mask=[True]),
        TypeError,
        "reset_mask has to be a tensor of torch.bool, got list",
    ),
    "reset_mask that is a list, unbatched": (
        lambda m: m(X[:, 0], reset_mask=[True]),
        TypeError,
        "reset_mask has to be a tensor of torch.bool, got list",
    ),
    "reset_mask transposed": (
        lambda m: m(X, reset_mask=torch.zeros(B, T, dtype=torch.bool)),
        ValueError,
        "reset_mask has to be of shape [T, B] = [6, 4], got [4, 6]",
    ),
    "4-D input": (
        lambda m: m(X[None], lengths=[1]),
        ValueError,
        "GRU: Expected input to be 2D or 3D, got 4D instead",
    ),
    "no steps": (
        lambda m: m(X[:0], lengths=[0] * B),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN",
    ),
    "hx of wrong batch": (
        lambda m: m(X, torch.zeros(1, 3, H), lengths=[1] * B),
        RuntimeError,
        "Expected hidden size (1, 4, 5), got [1, 3, 5]",
    ),
    "hx of wrong rank": (
        lambda m: m(X, torch.zeros(4, H), lengths=[1] * B),
        RuntimeError,
        "For batched 3-D input, hx should also be 3-D but got 2-D tensor",
    ),
    "hx of wrong dtype": (
        lambda m: m(X, torch.zeros(1, B, H).double(), lengths=[1] * B),
        RuntimeError,
        "mat1 and mat2 must have the same dtype, but got Double and Float",
    ),
    "hx on another device": (
        lambda m: m(X, torch.zeros(1, B, H, device="meta"), lengths=[1] * B),
        RuntimeError,
        "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta",
    ),
    "input of wrong size": (
        lambda m: m(torch.randn(T, B, 7), lengths=[1] * B),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 3, got 7",
    ),
    "jagged, transposed": (
        lambda m: m(nested(2, 3).transpose(1, 2)),
        ValueError,
        "jagged input has to be of shape [B, lengths, 3], got [2, 3, j",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind) as caught:
        call(fastgru.GRU(I, H))
    assert str(caught.value).startswith(message)
