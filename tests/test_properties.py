"""What holds for every GRU, whatever its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastgru

# The engine fixture holds for all examples of a test.
settings.register_profile(
    "fastgru", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("fastgru")

SIZES = st.fixed_dictionaries(
    {
        "T": st.integers(2, 12),
        "B": st.integers(1, 20),
        "I": st.integers(1, 40),
        "H": st.integers(1, 70),
        "seed": st.integers(0, 1000),
    }
)


def make(sizes: dict[str, int], **options: Any) -> tuple[fastgru.GRU, torch.Tensor, torch.Tensor]:
    torch.manual_seed(sizes["seed"])
    module = fastgru.GRU(sizes["I"], sizes["H"], **options)
    directions = module.num_layers * (2 if module.bidirectional else 1)
    return module, torch.randn(sizes["T"], sizes["B"], sizes["I"]), torch.randn(directions, sizes["B"], sizes["H"])


@given(sizes=SIZES, data=st.data())
def test_a_sequence_split_in_two_is_the_whole(engine: str, sizes: dict[str, int], data: st.DataObject) -> None:
    module, x, hx = make(sizes, num_layers=2)
    cut = data.draw(st.integers(1, sizes["T"] - 1))
    with torch.no_grad():
        output, h_n = module(x, hx)
        first, middle = module(x[:cut], hx)
        second, last = module(x[cut:], middle)
    torch.testing.assert_close(torch.cat([first, second]), output)
    torch.testing.assert_close(last, h_n)


@given(sizes=SIZES, data=st.data())
def test_permuting_the_batch_permutes_the_result(engine: str, sizes: dict[str, int], data: st.DataObject) -> None:
    module, x, hx = make(sizes, bidirectional=True)
    order = torch.tensor(data.draw(st.permutations(range(sizes["B"]))))
    with torch.no_grad():
        output, h_n = module(x, hx)
        permuted, permuted_h_n = module(x[:, order], hx[:, order])
    torch.testing.assert_close(permuted, output[:, order])
    torch.testing.assert_close(permuted_h_n, h_n[:, order])


@given(sizes=SIZES)
def test_reversing_time_swaps_the_directions(engine: str, sizes: dict[str, int]) -> None:
    module, x, hx = make(sizes, bidirectional=True)
    swapped = fastgru.GRU(sizes["I"], sizes["H"], bidirectional=True)
    state = module.state_dict()
    swapped.load_state_dict(
        {name: state[name.removesuffix("_reverse") if "_reverse" in name else name + "_reverse"] for name in state}
    )
    with torch.no_grad():
        output, h_n = module(x, hx)
        reversed_output, reversed_h_n = swapped(x.flip(0), hx.flip(0))
    forward, backward = output.chunk(2, dim=-1)
    torch.testing.assert_close(reversed_output.flip(0), torch.cat([backward, forward], dim=-1))
    torch.testing.assert_close(reversed_h_n.flip(0), h_n)


@given(sizes=SIZES)
def test_an_update_gate_of_one_keeps_the_state(engine: str, sizes: dict[str, int]) -> None:
    module, x, hx = make(sizes)
    hidden = sizes["H"]
    with torch.no_grad():
        for bias in (module.bias_ih_l0, module.bias_hh_l0):
            bias[hidden : 2 * hidden] = 1000.0
        output, h_n = module(x, hx)
    # Not to the bit: n + z * (h - n), nn.GRU's form too, rounds twice.
    torch.testing.assert_close(output, hx.expand(sizes["T"], -1, -1))
    torch.testing.assert_close(h_n, hx)


@given(sizes=SIZES, data=st.data())
def test_packed_rows_are_what_each_row_gives_alone(engine: str, sizes: dict[str, int], data: st.DataObject) -> None:
    module, x, hx = make(sizes, bidirectional=True)
    lengths = data.draw(st.lists(st.integers(1, sizes["T"]), min_size=sizes["B"], max_size=sizes["B"]))
    with torch.no_grad():
        packed, h_n = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        padded, _ = pad_packed_sequence(packed)
        for row, length in enumerate(lengths):
            alone, alone_h_n = module(x[:length, row : row + 1], hx[:, row : row + 1])
            torch.testing.assert_close(padded[:length, row], alone[:, 0])
            torch.testing.assert_close(h_n[:, row], alone_h_n[:, 0])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(sizes=SIZES, threads=st.integers(2, 4), data=st.data())
def test_the_number_of_threads_and_the_rest_of_the_batch_change_no_bit(
    backend: str, dtype: torch.dtype, sizes: dict[str, int], threads: int, data: st.DataObject
) -> None:
    module, x, hx = make(sizes)
    module, x, hx = module.to(dtype), x.to(dtype), hx.to(dtype)
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, sizes["B"] - 1), min_size=1))))
    with torch.no_grad():
        output, h_n = module(x, hx)
        torch.set_num_threads(threads)
        try:
            threaded, threaded_h_n = module(x, hx)
        finally:
            torch.set_num_threads(1)
        some, some_h_n = module(x[:, rows], hx[:, rows])
    assert torch.equal(threaded, output)
    assert torch.equal(threaded_h_n, h_n)
    assert torch.equal(some, output[:, rows])
    assert torch.equal(some_h_n, h_n[:, rows])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@given(sizes=SIZES, threads=st.integers(2, 4))
def test_the_number_of_threads_changes_no_bit_of_the_gradients(
    backend: str, sizes: dict[str, int], threads: int
) -> None:
    module, x, hx = make(sizes, bidirectional=True)
    leaves = [x.requires_grad_(), hx.requires_grad_(), *module.parameters()]
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            output, h_n = module(x, hx)
            results.append(torch.autograd.grad(output.sin().sum() + h_n.sum(), leaves))
        finally:
            torch.set_num_threads(1)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)
