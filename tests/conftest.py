"""Backends to run the tests on, and memory that shows when it is read before it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import fastgru
from fastgru import _library

# torch.compile's stored graphs know nothing of a change to our fake kernels.
os.environ.update(TORCHINDUCTOR_FX_GRAPH_CACHE="0", TORCHINDUCTOR_AUTOGRAD_CACHE="0")

pytest_plugins = ["tests.compatibility"]

# The workers of xdist share the cores; the tests of threading ask for more threads themselves.
torch.set_num_threads(1)

BACKENDS = ["reference", "cpu"]
# Every instruction set of the C++ backend.
ENGINES = [
    "reference",
    *(["cpu"] if _library.load_error else [f"cpu-{isa}" for isa in torch.ops.fastgru.cpu_isas().split(",")]),
]


def _enter(name: str) -> fastgru.use_backend:
    try:
        return fastgru.use_backend(name)
    except fastgru.BackendUnavailable as error:
        if os.environ.get("FASTGRU_REQUIRE_EXTENSION"):
            pytest.fail(f"FASTGRU_REQUIRE_EXTENSION is set: {error}")
        pytest.skip(str(error))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend."""
    with _enter(request.param):
        yield request.param


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend and each of its instruction sets."""
    name, _, isa = request.param.partition("-")
    with _enter(name):
        if not isa:
            yield request.param
            return
        before = torch.ops.fastgru.cpu_isa()
        torch.ops.fastgru.cpu_set_isa(isa)
        yield request.param
        torch.ops.fastgru.cpu_set_isa(before)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fills fresh memory with NaN, torch's and the compiled library's."""
    torch.use_deterministic_algorithms(True)
    if _library.load_error is None:
        torch.ops.fastgru.cpu_set_poison(True)
    yield
    torch.use_deterministic_algorithms(False)
    if _library.load_error is None:
        torch.ops.fastgru.cpu_set_poison(False)


@pytest.fixture(params=[0, 5], ids=["one chunk", "chunks of 5 tokens"])
def chunks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test with the compiled backward pass as it is, and cut into many chunks of the sequence."""
    if _library.load_error is not None:
        if request.param:
            pytest.skip("only the compiled library works in chunks")
        yield
        return
    torch.ops.fastgru.cpu_set_chunk_tokens(request.param)
    yield
    torch.ops.fastgru.cpu_set_chunk_tokens(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
