"""``python -m fastgru verify``: compares every backend that runs here with float64, family by family."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

import fastgru
from fastgru import testing
from fastgru.backends import registry
from fastgru.cli import _machine
from fastgru.cli._common import DTYPES, backend_name, show_table

Problem: TypeAlias = testing.GruProblem | testing.AttentionProblem
Gru, Attention = testing.GruProblem, testing.AttentionProblem

# By family. Odd sizes, a single step, a single row, tails of every vector width, and what the kernels treat apart. The
# last of a family has work for several threads.
PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "gru": (
        Gru(T=1, B=1, I=1, H=1),
        Gru(T=1, B=5, I=100, H=64),
        Gru(T=9, B=1, I=7, H=100, bias=False, hx=False),
        Gru(T=7, B=13, I=33, H=65, num_layers=2, bidirectional=True, batch_first=True),
        Gru(T=12, B=6, I=16, H=48, bidirectional=True, packed=True),
        Gru(T=20, B=34, I=64, H=130),
    ),
    "attention": (
        Attention(B=1, Hq=1, Hk=1, Lq=1, Lk=1, D=1, Dv=1),
        Attention(Lq=33, Lk=70, D=33, Dv=17, causal=True),
        Attention(Hq=8, Lq=1, Lk=130, D=64, Dv=64, k_lengths=True),
        Attention(Lq=40, Lk=50, D=16, Dv=16, causal=True, q_lengths=True, k_lengths=True, window=(9, -1)),
        Attention(Hq=3, Hk=3, Lq=9, Lk=40, softcap=2.0, alibi="H", bias=(1, 2, 3)),
        Attention(Lq=17, Lk=90, D=32, Dv=32, mask=(0, 3), heads_last=True, sdpa=True),
        Attention(Hk=1, Lq=20, Lk=20, D=40, Dv=40, mask=(2, 3), float_mask=True, sdpa=True),
        Attention(Lq=17, Lk=200, D=16, Dv=16, mask=(0, 2, 3), lowest_mask=True),
        Attention(Lq=70, Lk=300, D=64, Dv=64, causal=True, align="top_left", heads_last=True),
    ),
}


def compared(problem: Problem) -> list[testing.Comparison]:
    """Outputs and every gradient of a problem, under the rule."""
    if isinstance(problem, testing.GruProblem):
        return testing.parity(problem)
    return testing.attention_parity(problem)


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Run the block on one variant of the C++ kernels; ``None`` leaves everything as it is."""
    if name is None:
        yield
        return
    before = _machine.current_isa()
    torch.ops.fastgru.cpu_set_isa(name)
    try:
        yield
    finally:
        torch.ops.fastgru.cpu_set_isa(before)


def closeness(comparison: testing.Comparison) -> tuple[bool, float]:
    """Sorts comparisons: the larger, the closer to the limit or the farther beyond it."""
    return not comparison.ok, comparison.error / comparison.limit if comparison.limit else 0.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_difference(problem: Problem, count: int) -> testing.Comparison:
    """How far ``count`` threads and one are apart in outputs and gradients of the C++ backend: by nothing at all."""
    generator = torch.Generator().manual_seed(problem.seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    p, sources = problem, list[Tensor]()
    call: Callable[[], Tensor]
    if isinstance(p, testing.GruProblem):
        module = fastgru.GRU(p.I, p.H)
        sources += [leaf(p.T, p.B, p.I), *module.parameters()]
        call = lambda: module(sources[0])[0]  # noqa: E731
    else:
        sources += [leaf(p.B, p.Hq, p.Lq, p.D), leaf(p.B, p.Hk, p.Lk, p.D), leaf(p.B, p.Hk, p.Lk, p.Dv)]
        call = lambda: fastgru.flash_attention(*sources, causal=True, enable_gqa=True)  # noqa: E731

    def results() -> list[Tensor]:
        output = call()
        return [output.detach(), *torch.autograd.grad(output, sources, torch.ones_like(output))]

    alone = results()
    with threads(count):
        together = results()
    error = max((a - b).abs().max().item() for a, b in zip(alone, together, strict=True))
    return testing.Comparison(f"{count} threads, not 1", error, 0.0, 0.0)


@dataclass
class Findings:
    """The table's rows, and what is said below it."""

    rows: list[list[str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, family: str, what: str, dtype: str, item: testing.Comparison) -> None:
        verdict = "PASS" if item.ok else "FAIL"
        self.rows.append([family, what, dtype, f"{item.error:.2g}", f"{item.limit:.2g}", item.name, verdict])


def run(args: argparse.Namespace) -> int:
    # On one thread: how long nn.GRU's many small parallel regions take on a busy machine is anybody's guess. That the
    # C++ backend computes the same bits on all threads is compared by itself.
    count = torch.get_num_threads()
    with threads(1):
        return check(count)


def check(count: int) -> int:
    """Print the comparisons, ``count`` threads against one among them, and return the exit code."""
    began = time.perf_counter()
    backend_name(torch.device("cpu"), torch.float32)
    found = Findings()
    for family in PROBLEMS:
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for backend in registry.backends(family):
                if "*" not in backend.devices and device not in backend.devices:
                    continue
                for name, dtype in DTYPES.items():
                    reason = backend.why_not(device, dtype)
                    if reason is not None:
                        line = f"{backend.name}, {name} on {device}: {reason}"
                        # Mostly the same for every family.
                        if line not in found.skipped:
                            found.skipped.append(line)
                        continue
                    for isa in _machine.usable_isas() if backend.name == "cpu" else [None]:
                        with fastgru.use_backend(backend.name), instruction_set(isa):
                            check_backend(found, family, backend.name, isa, device, name, count)
    columns = ["family", "backend", "dtype", "error", "allowed", "of", ""]
    title = "Outputs and gradients against float64: what comes closest to its limit"
    show_table(title, columns, found.rows, right=(3, 4))
    for line in found.skipped:
        print(f"Skipped: {line}")
    for line in found.failures:
        print(f"FAILED: {line}")
    verdict = f"{len(found.failures)} are wrong" if found.failures else "all within the rule"
    print(f"{found.total} tensors compared in {time.perf_counter() - began:.1f} s: {verdict}.")
    return 1 if found.failures else 0


def check_backend(
    found: Findings, family: str, backend: str, isa: str | None, device: str, dtype: str, count: int
) -> None:
    """Compare every problem of a family, on the backend and instruction set in use; only those it has kernels for."""
    what = " ".join([backend, *([isa] if isa else []), *([device] if device != "cpu" else [])])
    comparisons: list[testing.Comparison] = []
    problems = [replace(problem, dtype=DTYPES[dtype], device=device) for problem in PROBLEMS[family]]
    refused = []
    for problem in problems:
        try:
            results = compared(problem)
        except fastgru.BackendUnavailable as error:
            refused.append(str(error))
            continue
        comparisons += results
        found.failures += [f"{what}, {problem}, {item}" for item in results if not item.ok]
    if refused:
        found.skipped.append(f"{family}, {what}, {dtype}: {len(refused)} of {len(problems)} problems: {refused[0]}")
    if not comparisons:
        return
    found.total += len(comparisons)
    found.add(family, what, dtype, max(comparisons, key=closeness))
    if isa and dtype == "float32" and count > 1:
        difference = thread_difference(PROBLEMS[family][-1], count)
        found.add(family, what, dtype, difference)
        found.failures += [f"{what}: {difference}"] if not difference.ok else []


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every backend's numbers on this machine",
        description="Compare the GRU and attention of every available backend, instruction set and dtype with a "
        "float64 reference on a handful of problems (odd sizes, packed, bidirectional; causal, masks, lengths, grouped "
        "heads): outputs and all gradients. The error may be at most twice that of torch's own operator in the same "
        "dtype (gradients of attention: three times), plus a small floor. All threads must give the same bits as one. "
        "Takes seconds and needs torch alone. Exit code 0 if all pass, 1 if not.",
    )
    parser.set_defaults(run=run)
