"""What the table of shapes does not show: any shape at all, a busy neighbour, memory, bfloat16. One JSON record.

    python benchmarks/cpu_conditions.py [--threads N] [--shapes N] [--only ...] [--output DIR]

Times are medians of alternating blocks in one process, memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_gru import ROOT, geometric_mean
from memory import peak_bytes
from problems import CPU_GRU, Problem
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastgru
from fastgru.cli import _machine
from fastgru.cli._timing import time_pair

Step = Callable[[], Any]
Save = Callable[[dict[str, Any]], None]  # called with what a part has so far, after every row
CPU = torch.device("cpu")


def steps(module: nn.Module, x: Any, hx: torch.Tensor) -> tuple[Step, Step]:
    """The forward pass without gradients, and a training step without the optimizer."""
    parameters = list(module.parameters())

    def forward() -> Any:
        with torch.no_grad():
            return module(x, hx)

    def training() -> Any:
        output, h_n = module(x, hx)
        data = output if isinstance(output, torch.Tensor) else output.data
        return torch.autograd.grad((data, h_n), parameters, (torch.ones_like(data), torch.ones_like(h_n)))

    return forward, training


def sweep(shapes: int, seconds: float, save: Save) -> None:
    """Random shapes, layers, directions and packings beside nn.GRU."""
    draw = random.Random(0)
    rows = []
    while len(rows) < shapes:
        T, B, I, H = (round(2 ** draw.uniform(0, limit)) for limit in (8, 7, 10, 10))
        layers, bidirectional, packed = draw.randint(1, 3), draw.random() < 0.5, draw.random() < 0.5
        torch.manual_seed(len(rows))
        theirs = nn.GRU(I, H, layers, bidirectional=bidirectional)
        ours = fastgru.GRU(I, H, layers, bidirectional=bidirectional)
        ours.load_state_dict(theirs.state_dict())
        x: Any = torch.randn(T, B, I)
        if packed:
            x = pack_padded_sequence(x, [draw.randint(1, T) for _ in range(B)], enforce_sorted=False)
        hx = torch.zeros(layers * (1 + bidirectional), B, H)
        pairs = list(zip(steps(theirs, x, hx), steps(ours, x, hx), strict=True))
        want, got = (pairs[0][i]()[1] for i in (0, 1))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        row: dict[str, Any] = {"T": T, "B": B, "I": I, "H": H, "layers": layers}
        row |= {"bidirectional": bidirectional, "packed": packed}
        for mode, (baseline, candidate) in zip(("forward", "training"), pairs, strict=True):
            row[mode] = time_pair(baseline, candidate, device=CPU, seconds=seconds).summary()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        summary = {}
        for mode in ("forward", "training"):
            values = [row[mode]["speedup"] for row in rows]
            summary[mode] = {
                "geometric_mean": geometric_mean(values),
                "worst": min(values),
                "below_one": sum(value < 1 for value in values),
            }
        save({"rows": rows, "summary": summary})


def block(function: Step, seconds: float) -> float:
    """Mean time of a call over ``seconds``: what a neighbour costs is in the mean, not in the median."""
    function()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls


def neighbour(seconds: float, save: Save) -> None:
    """Time with a busy process pinned to one core, over time without."""
    core = max(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{core}]); any(iter(int, 1))"
    rows = []
    for problem in CPU_GRU:
        T, B, I, H = problem
        x, hx = torch.randn(T, B, I), torch.zeros(1, B, H)
        row: dict[str, Any] = {**problem._asdict()}
        modules = {"fastgru": fastgru.GRU(I, H), "nn.GRU": nn.GRU(I, H)}
        functions = {
            (mode, name): function
            for name, module in modules.items()
            for mode, function in zip(("forward", "training"), steps(module, x, hx), strict=True)
        }
        alone = {key: block(function, seconds) for key, function in functions.items()}
        process = subprocess.Popen([sys.executable, "-c", spin])
        try:
            time.sleep(0.5)
            beside = {key: block(function, seconds) for key, function in functions.items()}
        finally:
            process.kill()
            process.wait()
        for mode, name in functions:
            row.setdefault(mode, {})[name] = beside[mode, name] / alone[mode, name]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        worst = {mode: max(row[mode]["fastgru"] for row in rows) for mode in ("forward", "training")}
        save({"core": core, "rows": rows, "summary": {"worst": worst}})


def memory(threads: int, save: Save) -> None:
    """Peak resident memory of training steps, beyond what the process held before them."""
    rows = []
    for problem in CPU_GRU:
        row: dict[str, Any] = {**problem._asdict(), "bytes": {}}
        for name in ("nn.GRU", "fastgru", "fastgru, save_gates=False"):
            row["bytes"][name] = peak_bytes("gru", name, problem, threads)
        row["of_nn_gru"] = {name: row["bytes"][name] / row["bytes"]["nn.GRU"] for name in list(row["bytes"])[1:]}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        save({"rows": rows})


def bf16(seconds: float, save: Save) -> None:
    """bfloat16 beside fastgru's own float32."""
    rows = []
    for problem in (Problem(64, 32, 256, 256), Problem(64, 32, 512, 512), Problem(64, 128, 512, 512)):
        T, B, I, H = problem
        full, half = fastgru.GRU(I, H), fastgru.GRU(I, H, dtype=torch.bfloat16)
        x, hx = torch.randn(T, B, I), torch.zeros(1, B, H)
        row: dict[str, Any] = {**problem._asdict()}
        pairs = zip(steps(full, x, hx), steps(half, x.bfloat16(), hx.bfloat16()), strict=True)
        for mode, (baseline, candidate) in zip(("forward", "training"), pairs, strict=True):
            row[mode] = time_pair(baseline, candidate, device=CPU, seconds=seconds).summary()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        save({"isa": torch.ops.fastgru.cpu_isa(), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", type=int, default=60, help="random shapes")
    parser.add_argument("--seconds", type=float, default=0.5, help="per pair")
    parser.add_argument("--only", nargs="+", choices=["sweep", "neighbour", "memory", "bf16"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts: dict[str, Callable[[Save], None]] = {
        "memory": lambda save: memory(options.threads, save),
        "bf16": lambda save: bf16(options.seconds, save),
        "neighbour": lambda save: neighbour(options.seconds, save),
        "sweep": lambda save: sweep(options.shapes, options.seconds, save),
    }
    path = options.output / "cpu_conditions.json"
    record = json.loads(path.read_text()) if options.only and path.exists() else {}
    record |= {
        "benchmark": "cpu_conditions",
        **_machine.origin(),
        "threads": options.threads,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only or parts:

        def save(result: dict[str, Any], name: str = name) -> None:
            record[name] = result
            path.write_text(json.dumps(record, indent=1) + "\n")

        parts[name](save)
    shapes = record.get("sweep", {}).get("rows", [])
    if shapes:
        for mode in ("forward", "training"):
            middle = statistics.median(row[mode]["speedup"] for row in shapes)
            print(f"{mode}: median {middle:.2f}x over {len(shapes)} random shapes")


if __name__ == "__main__":
    main()
