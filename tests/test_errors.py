"""The same bad call raises the same error, type and text, in torch.nn and here."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastgru
from fastgru.ops.gru.onnx import gru_node

GRU = type[nn.GRU] | type[fastgru.GRU]
Cell = type[nn.GRUCell]

CONSTRUCTOR: dict[str, Callable[[Any], Any]] = {
    "negative input_size": lambda gru: gru(-5, 6),
    "negative hidden_size": lambda gru: gru(5, -6),
    "zero input_size": lambda gru: gru(0, 6),
    "zero hidden_size": lambda gru: gru(5, 0),
    "float input_size": lambda gru: gru(5.0, 6),
    "string hidden_size": lambda gru: gru(5, "6"),
    "zero num_layers": lambda gru: gru(5, 6, 0),
    "negative num_layers": lambda gru: gru(5, 6, -1),
    "float num_layers": lambda gru: gru(5, 6, 1.5),
    "dropout above one": lambda gru: gru(5, 6, 2, dropout=1.5),
    "negative dropout": lambda gru: gru(5, 6, 2, dropout=-0.1),
    "boolean dropout": lambda gru: gru(5, 6, 2, dropout=True),
    "string dropout": lambda gru: gru(5, 6, 2, dropout="x"),
    "non-boolean bias": lambda gru: gru(5, 6, bias=1),
    "non-boolean batch_first": lambda gru: gru(5, 6, batch_first="yes"),
    "proj_size": lambda gru: gru(5, 6, proj_size=3),
    "proj_size zero": lambda gru: gru(5, 6, proj_size=0),
    "unknown keyword": lambda gru: gru(5, 6, foo=1),
    "hidden_size missing": lambda gru: gru(5),
    "too many arguments": lambda gru: gru(5, 6, 1, True, False, 0.0, False, 0, "cpu", torch.float32, 1),
    "integer dtype": lambda gru: gru(5, 6, dtype=torch.int64),
    "unknown device": lambda gru: gru(5, 6, device="nowhere"),
}


# Which torch accepts before 2.11, and so does this package with it.
NEWER_CHECKS = ("zero input_size", "non-boolean bias", "non-boolean batch_first")


def packed(features: int = 5) -> PackedSequence:
    return pack_sequence([torch.randn(3, features), torch.randn(5, features)], enforce_sorted=False)


FORWARD: dict[str, Callable[[Any], Any]] = {
    "1-D input": lambda m: m(torch.randn(5)),
    "4-D input": lambda m: m(torch.randn(2, 3, 4, 5)),
    "wrong input size": lambda m: m(torch.randn(4, 3, 7)),
    "wrong input size, unbatched": lambda m: m(torch.randn(4, 7)),
    "zero-length sequence": lambda m: m(torch.randn(0, 3, 5)),
    "zero-length sequence, unbatched": lambda m: m(torch.randn(0, 5)),
    "zero-length sequence, no rows": lambda m: m(torch.randn(0, 0, 5)),
    "zero-length sequence, hx": lambda m: m(torch.randn(0, 3, 5), torch.randn(1, 3, 6)),
    "input of another dtype": lambda m: m(torch.randn(4, 3, 5).double()),
    "input of integers": lambda m: m(torch.ones(4, 3, 5, dtype=torch.int64)),
    "input on another device": lambda m: m(torch.randn(4, 3, 5, device="meta")),
    "input that is no tensor": lambda m: m([[1.0]]),
    "no input": lambda m: m(),
    "hx 2-D for a batch": lambda m: m(torch.randn(4, 3, 5), torch.randn(1, 6)),
    "hx 3-D, unbatched": lambda m: m(torch.randn(4, 5), torch.randn(1, 1, 6)),
    "hx of wrong layers": lambda m: m(torch.randn(4, 3, 5), torch.randn(2, 3, 6)),
    "hx of wrong batch": lambda m: m(torch.randn(4, 3, 5), torch.randn(1, 4, 6)),
    "hx of wrong size": lambda m: m(torch.randn(4, 3, 5), torch.randn(1, 3, 7)),
    "hx of wrong size, unbatched": lambda m: m(torch.randn(4, 5), torch.randn(1, 7)),
    "hx of float64": lambda m: m(torch.randn(4, 3, 5), torch.randn(1, 3, 6).double()),
    "hx of float16": lambda m: m(torch.randn(4, 3, 5), torch.randn(1, 3, 6).half()),
    "hx of integers": lambda m: m(torch.randn(4, 3, 5), torch.ones(1, 3, 6, dtype=torch.int64)),
    "hx on another device": lambda m: m(torch.randn(4, 3, 5), torch.randn(1, 3, 6, device="meta")),
    "hx that is a tuple": lambda m: m(torch.randn(4, 3, 5), (torch.randn(1, 3, 6),)),
    "packed, wrong input size": lambda m: m(packed(7)),
    "packed, hx 2-D": lambda m: m(packed(), torch.randn(1, 6)),
    "packed, hx of wrong layers": lambda m: m(packed(), torch.randn(2, 2, 6)),
    "packed, hx of wrong size": lambda m: m(packed(), torch.randn(1, 2, 7)),
    "packed, hx of another dtype": lambda m: m(packed(), torch.randn(1, 2, 6).double()),
    "packed, input of another dtype": lambda m: m(packed().to(torch.float64)),
    "packed, sorted, hx of wrong batch": lambda m: m(pack_sequence([torch.randn(3, 5)]), torch.randn(1, 2, 6)),
    "packed, nothing in it": lambda m: m(PackedSequence(torch.randn(0, 5), torch.tensor([], dtype=torch.int64))),
}

CELL: dict[str, Callable[[Any], Any]] = {
    "negative size": lambda cell: cell(-5, 6),
    "string size": lambda cell: cell("5", 6),
    "3-D input": lambda cell: cell(5, 6)(torch.randn(1, 3, 5)),
    "3-D hx": lambda cell: cell(5, 6)(torch.randn(3, 5), torch.randn(1, 3, 6)),
    "wrong input size": lambda cell: cell(5, 6)(torch.randn(3, 4)),
    "wrong input size, unbatched": lambda cell: cell(5, 6)(torch.randn(4)),
    "wrong hx size": lambda cell: cell(5, 6)(torch.randn(3, 5), torch.randn(3, 7)),
    "wrong hx batch": lambda cell: cell(5, 6)(torch.randn(3, 5), torch.randn(2, 6)),
    "hx of batch one": lambda cell: cell(5, 6)(torch.randn(3, 5), torch.randn(1, 6)),
    "1-D hx for a batch": lambda cell: cell(5, 6)(torch.randn(3, 5), torch.randn(6)),
    "1-D hx, the size of the batch": lambda cell: cell(5, 6)(torch.randn(6, 5), torch.randn(6)),
    "2-D hx, unbatched": lambda cell: cell(5, 6)(torch.randn(5), torch.randn(1, 6)),
    "input of another dtype": lambda cell: cell(5, 6)(torch.randn(3, 5).double()),
    "input of another dtype, unbatched": lambda cell: cell(5, 6)(torch.randn(5).double()),
    "input of integers": lambda cell: cell(5, 6)(torch.ones(3, 5, dtype=torch.int64)),
    "hx of another dtype": lambda cell: cell(5, 6)(torch.randn(3, 5), torch.randn(3, 6).double()),
}


def error_of(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    pytest.fail("no error")


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_constructor(name: str) -> None:
    if name in NEWER_CHECKS:
        try:
            CONSTRUCTOR[name](nn.GRU)
        except Exception:
            pass
        else:
            pytest.skip("this torch accepts it")
    assert error_of(lambda: CONSTRUCTOR[name](fastgru.GRU)) == error_of(lambda: CONSTRUCTOR[name](nn.GRU))


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("grad", [False, True])
def test_forward(backend: str, name: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        got, want = (error_of(lambda gru=gru: FORWARD[name](gru(5, 6))) for gru in (fastgru.GRU, nn.GRU))
    if want[0] is TypeError:  # Python's own, which name the class
        got, want = ((kind, re.sub(r"^.*forward", "forward", text)) for kind, text in (got, want))
    assert got == want


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64]


@pytest.mark.parametrize("module_dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_casts_what_it_casts_for_nn_gru(module_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, states = torch.ones(4, 3, 5).to(dtype), [None, *(torch.ones(1, 3, 6).to(kind) for kind in DTYPES)]
    gru, cell = nn.GRU(5, 6, dtype=module_dtype), nn.GRUCell(5, 6, dtype=module_dtype)

    def result(call: Callable[[], Any]) -> Any:
        try:
            with torch.autocast("cpu", torch.bfloat16):
                return call()
        except RuntimeError as error:
            return str(error)

    for hx in states:
        for module, arguments in ((gru, (x, hx)), (cell, (x[0], None if hx is None else hx[0]))):
            want = result(lambda module=module, arguments=arguments: module(*arguments))
            ours = fastgru.convert(copy.deepcopy(module))
            got = result(lambda module=ours, arguments=arguments: module(*arguments))
            if isinstance(want, str):
                assert got == want
            else:
                torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", CELL)
def test_cell(backend: str, name: str) -> None:
    assert error_of(lambda: CELL[name](fastgru.GRUCell)) == error_of(lambda: CELL[name](nn.GRUCell))


def test_dropout_of_a_single_layer_warns_as_nn_gru() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        fastgru.GRU(5, 6, dropout=0.5)


def test_proj_size_is_refused_in_its_position_too() -> None:
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not RNN or GRU"):
        fastgru.GRU(5, 6, 1, True, False, 0.0, False, 3)


def test_a_weight_of_another_dtype_raises(backend: str) -> None:
    module = fastgru.GRU(5, 6)
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().double())
    with pytest.raises(RuntimeError, match="self and mat2 must have the same dtype, but got Float and Double"):
        module(torch.randn(4, 3, 5))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_weight_of_another_size_raises(backend: str, name: str) -> None:
    module = fastgru.GRU(5, 6)
    shape = [size + 1 for size in getattr(module, name).shape]
    setattr(module, name, nn.Parameter(torch.randn(shape)))
    with pytest.raises(RuntimeError):
        module(torch.randn(4, 3, 5))


@pytest.mark.parametrize("batch_sizes", [[2, 2], [2, 3], [3, 2], [2, 1, 1], [-1, 6]], ids=str)
def test_batch_sizes_that_do_not_fit_raise(backend: str, batch_sizes: list[int]) -> None:
    module = fastgru.GRU(5, 6)
    with pytest.raises(RuntimeError):
        fastgru.gru(
            torch.randn(5, 5),
            torch.zeros(1, 2, 6),
            list(module.parameters()),
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=False,
            bidirectional=False,
            batch_first=False,
            batch_sizes=torch.tensor(batch_sizes),
        )


@pytest.mark.parametrize("base", [fastgru.GRU, fastgru.GRUCell])
def test_torch_script_refuses_subclasses_and_names_the_remedy(base: Any) -> None:
    class Mine(base):  # type: ignore[misc]
        pass

    with pytest.raises(RuntimeError, match=rf"cannot compile Mine, .*fastgru\.{base.__name__}: call fastgru\.revert"):
        torch.jit.script(nn.Sequential(Mine(5, 6)))


def test_onnx_refuses_packed_input() -> None:
    weights = [w.detach() for w in fastgru.GRU(5, 6).parameters()]
    with pytest.raises(RuntimeError, match="whole batches, not on packed input, lengths, resets"):
        gru_node(torch.randn(3, 5), torch.zeros(1, 2, 6), *weights, *[None] * 4, torch.tensor([2, 1]))
