"""``python -m fastgru verify``: does this machine compute the right numbers?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import fastgru
from fastgru import testing
from fastgru.backends import registry
from fastgru.cli import _machine
from fastgru.cli._common import DTYPES, backend_name, show_table

# Odd sizes, a single step, a single row, tails of every vector width, and what the kernels treat apart.
PROBLEMS = (
    testing.GruProblem(T=1, B=1, I=1, H=1),
    testing.GruProblem(T=1, B=5, I=100, H=64),
    testing.GruProblem(T=9, B=1, I=7, H=100, bias=False, hx=False),
    testing.GruProblem(T=7, B=13, I=33, H=65, num_layers=2, bidirectional=True, batch_first=True),
    testing.GruProblem(T=12, B=6, I=16, H=48, bidirectional=True, packed=True),
    testing.GruProblem(T=20, B=34, I=64, H=130),
)


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


def thread_difference(problem: testing.GruProblem, count: int) -> testing.Comparison:
    """How far ``count`` threads and one are apart in outputs and gradients of the C++ backend: by nothing at all."""
    generator = torch.Generator().manual_seed(problem.seed)
    input = torch.randn(problem.T, problem.B, problem.I, generator=generator).requires_grad_()
    module = fastgru.GRU(problem.I, problem.H)

    def results() -> list[Tensor]:
        output, _ = module(input)
        grads = torch.autograd.grad(output, [input, *module.parameters()], torch.ones_like(output))
        return [output.detach(), *grads]

    alone = results()
    with threads(count):
        together = results()
    error = max((a - b).abs().max().item() for a, b in zip(alone, together, strict=True))
    return testing.Comparison(f"{count} threads, not 1", error, 0.0, 0.0)


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
    rows, skipped, failures, total = [], [], [], 0
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for backend in registry.backends():
            if "*" not in backend.devices and device not in backend.devices:
                continue
            for name, dtype in DTYPES.items():
                reason = backend.why_not(device, dtype)
                if reason is not None:
                    skipped.append(f"{backend.name}, {name} on {device}: {reason}")
                    continue
                for isa in _machine.usable_isas() if backend.name == "cpu" else [None]:
                    what = " ".join([backend.name, *([isa] if isa else []), *([device] if device != "cpu" else [])])
                    comparisons = []
                    with fastgru.use_backend(backend.name), instruction_set(isa):
                        for problem in (replace(problem, dtype=dtype, device=device) for problem in PROBLEMS):
                            found = testing.parity(problem)
                            comparisons += found
                            failures += [f"{what}, {problem}, {item}" for item in found if not item.ok]
                        judged = [max(comparisons, key=closeness)]
                        if isa and dtype == torch.float32 and count > 1:
                            judged.append(thread_difference(PROBLEMS[-1], count))
                            failures += [f"{what}: {item}" for item in judged[1:] if not item.ok]
                    for item in judged:
                        verdict = "PASS" if item.ok else "FAIL"
                        rows.append([what, name, f"{item.error:.2g}", f"{item.limit:.2g}", item.name, verdict])
                    total += len(comparisons)
    columns = ["backend", "dtype", "error", "allowed", "of", ""]
    show_table("Outputs and gradients against float64: what comes closest to its limit", columns, rows, right=(2, 3))
    for line in skipped:
        print(f"Skipped: {line}")
    for line in failures:
        print(f"FAILED: {line}")
    verdict = f"{len(failures)} are wrong" if failures else "all within the rule"
    print(f"{total} tensors compared in {time.perf_counter() - began:.1f} s: {verdict}.")
    return 1 if failures else 0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every backend's numbers on this machine",
        description="Compare every available backend, instruction set and dtype with a float64 reference on a handful "
        "of problems (odd sizes, packed, bidirectional): outputs and all gradients. The error may be at most twice "
        "that of torch.nn.GRU in the same dtype, plus a small floor. All threads must give the same bits as one. "
        "Takes seconds and needs torch alone. Exit code 0 if all pass, 1 if not.",
    )
    parser.set_defaults(run=run)
