"""Who runs: a backend asked for by name runs or raises, only auto falls back, and names of ISAs are checked."""

from __future__ import annotations

import _thread
import os
import queue
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgru
from fastgru import _library
from fastgru.backends import registry


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, as the environment is read once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTGRU_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )


KNOWN = "auto, cpu, cuda, cudnn, gluon, reference, triton"
RUN = "import torch, fastgru; fastgru.GRU(3, 4)(torch.randn(5, 2, 3)); "


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"unknown backend 'gpu'; known backends: {KNOWN}"):
        fastgru.use_backend("gpu")


def test_unknown_name_in_the_environment() -> None:
    result = python(RUN, FASTGRU_BACKEND="gpu")
    assert f"ValueError: FASTGRU_BACKEND: unknown backend 'gpu'; known backends: {KNOWN}" in result.stderr


def test_the_environment_chooses() -> None:
    result = python(RUN + "print(fastgru.explain())", FASTGRU_BACKEND="reference")
    assert "reference: chosen" in result.stdout
    assert "cpu: not used" in result.stdout


def test_use_backend_nests_and_restores() -> None:
    before = registry.requested()
    with fastgru.use_backend("reference"):
        assert registry.select("gru", "cpu", torch.float32).name == "reference"
        with fastgru.use_backend("auto"):
            assert registry.requested() == "auto"
        assert registry.requested() == "reference"
    assert registry.requested() == before


def test_use_backend_holds_when_called_plainly() -> None:
    with fastgru.use_backend("auto"):
        fastgru.use_backend("reference")
        assert registry.select("gru", "cpu", torch.float32).name == "reference"


def test_a_block_is_of_its_thread_and_a_plain_call_of_all() -> None:
    def elsewhere() -> str:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(registry.requested).result()

    def in_a_thread_of_autograd() -> str:
        """In one that Python did not start, as a backward pass on a GPU."""
        found: queue.SimpleQueue[str] = queue.SimpleQueue()
        _thread.start_new_thread(lambda: found.put(registry.requested()), ())
        return found.get(timeout=60)

    outside = registry.requested()
    with fastgru.use_backend("reference"):
        assert registry.requested() == in_a_thread_of_autograd() == "reference" and elsewhere() == outside
        fastgru.use_backend("auto")  # within a block: of the block
        assert registry.requested() == "auto" and elsewhere() == outside
    plain = fastgru.use_backend("reference")
    try:
        assert registry.requested() == elsewhere() == "reference"
        with fastgru.use_backend("auto"):
            assert registry.requested() == "auto" and elsewhere() == "reference"
        assert registry.requested() == elsewhere() == "reference"
    finally:
        registry._process = plain._before[0]
    assert registry.requested() == elsewhere() == in_a_thread_of_autograd() == outside


def test_a_compiled_function_follows_the_block_of_its_thread() -> None:
    ran: list[str] = []

    def recording(graph: torch.fx.GraphModule, _: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes if "_gru_" in str(node.target)]

        def run(*arguments: Any) -> Any:
            ran.extend(name.removeprefix("fastgru.").partition("_")[0] for name in names)
            return graph(*arguments)

        return run

    x = torch.randn(4, 1, 2)
    module = torch.compile(fastgru.GRU(2, 3), fullgraph=True, backend=recording)
    with torch.no_grad():
        for name in ("auto", "reference", "auto"):
            with fastgru.use_backend(name):
                module(x)
    with fastgru.use_backend("auto"):
        auto = registry.select("gru", "cpu", x.dtype).name
    assert ran == [auto, "reference", auto]


def test_backward_runs_on_the_backend_of_the_forward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 2, 3, requires_grad=True)
    output, _ = fastgru.GRU(3, 4)(x)
    with fastgru.use_backend("reference"):
        output.sum().backward()
    assert x.grad is not None


def test_a_backend_asked_for_raises_where_it_cannot_run(backend: str) -> None:
    if backend == "reference":
        with pytest.raises(fastgru.BackendUnavailable, match="computes in floating point"):
            registry.select("gru", "cpu", torch.int64)
    else:
        with pytest.raises(
            fastgru.BackendUnavailable, match=r"backend 'cpu' cannot run .* it runs on cpu, not on meta"
        ):
            registry.select("gru", "meta", torch.float32)


def test_no_backend_at_all_raises() -> None:
    with fastgru.use_backend("auto"), pytest.raises(fastgru.BackendUnavailable, match="no backend can run"):
        registry.select("gru", "cpu", torch.int64)


def test_explain_names_every_backend() -> None:
    text = fastgru.explain()
    assert "cpu" in text
    assert "reference" in text
    assert text.count(": chosen") == 1


@pytest.fixture
def broken_copy(tmp_path: Path) -> Path:
    """A copy of the package whose compiled library is missing."""
    root = Path(fastgru.__file__).parent
    shutil.copytree(root, tmp_path / "fastgru", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def other_platform() -> bytes:
    """The header of a library for another processor (RISC-V)."""
    header = bytearray(64)
    header[:20] = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + (243).to_bytes(2, "little")
    return bytes(header)


@pytest.mark.parametrize(
    "content", [None, b"", b"not a library", other_platform()], ids=["missing", "empty", "corrupt", "other-platform"]
)
def test_a_broken_library_falls_back_once_and_says_why(broken_copy: Path, content: bytes | None) -> None:
    if content is not None:
        (broken_copy / "fastgru" / "_C.so").write_bytes(content)
    start = f"import sys; sys.path.insert(0, {str(broken_copy)!r}); "
    result = python(start + RUN + RUN)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert "with the backend 'reference', because cpu: the compiled library" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    result = python(start + RUN, FASTGRU_BACKEND="cpu")
    assert "BackendUnavailable: backend 'cpu' cannot run" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    result = python(start + "from fastgru.cli import main; sys.exit(main(['info']))")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "not available: the compiled library" in words
    assert "pip install --no-build-isolation" in words


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_every_instruction_set_can_be_forced(backend: str) -> None:
    before = torch.ops.fastgru.cpu_isa()
    names = torch.ops.fastgru.cpu_isas().split(",")
    assert "generic" in names
    try:
        for name in names:
            torch.ops.fastgru.cpu_set_isa(name)
            assert torch.ops.fastgru.cpu_isa() == name
    finally:
        torch.ops.fastgru.cpu_set_isa(before)
    result = python(RUN + "print(torch.ops.fastgru.cpu_isa())", FASTGRU_CPU_ISA="generic")
    assert result.stdout.strip() == "generic"


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_unknown_instruction_set(backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"'sse9' is not an instruction set .* usable here: .*generic"):
        torch.ops.fastgru.cpu_set_isa("sse9")
    result = python(RUN, FASTGRU_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "FASTGRU_CPU_ISA: 'sse9' is not an instruction set" in result.stderr


def test_auto_does_not_warn_when_the_best_runs() -> None:
    if _library.load_error is not None:
        pytest.skip(_library.load_error)
    with warnings.catch_warnings(), fastgru.use_backend("auto"):
        warnings.simplefilter("error")
        assert registry.select("gru", "cpu", torch.float32).name == "cpu"
