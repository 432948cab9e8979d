"""Attention on the CPU beside torch's: speed with the roofline, memory, random shapes. One JSON record.

    python benchmarks/cpu_attention.py [--threads N] [--shapes N] [--seconds S] [--only ...] [--output DIR]

The peer is torch's scaled_dot_product_attention, on the same threads and dtype, with each of its two backends for the
CPU, flash and math, as long as it takes the problem; the better of them counts. All take turns in an order that
changes; a ratio is taken within its round, and the median of the rounds is the result. Nothing is timed before its
results have been compared with float64. Peaks of memory are those of processes of their own. The record is written
after every row.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_gru import ROOT, geometric_mean
from problems import CPU_ATTENTION_GOALS, GroupedAttention
from roofline import probes
from timing import Function, race, results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru
from fastgru.cli import _machine

PEERS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch math": SDPBackend.MATH}
MODES = ("forward", "training")
# Errors against float64, of the largest result: a few roundings.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def dtype(name: str) -> torch.dtype:
    """The dtype of a row's name for it."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextmanager
def selected(name: str) -> Iterator[None]:
    """Only this backend of torch's, or, for fastgru, none of them in particular."""
    if name in PEERS:
        with sdpa_kernel(PEERS[name]):
            yield
    else:
        yield


def tensors(
    problem: GroupedAttention, kind: torch.dtype, training: bool
) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Query, key and value, the options, and the gradient of the output."""
    torch.manual_seed(0)
    B, H, Hk, Lq, Lk, D = problem.sizes
    qkv = [
        torch.randn(B, heads, length, D, dtype=kind).requires_grad_(training)
        for heads, length in ((H, Lq), (Hk, Lk), (Hk, Lk))
    ]
    options: dict[str, Any] = {"is_causal": problem.causal}
    if Hk != H:
        options["enable_gqa"] = True
    if problem.mask:
        mask = torch.rand(B, 1, 1 if problem.mask == "keys" else Lq, Lk) < 0.8
        mask[..., 0] = True
        options["attn_mask"] = mask
    return qkv, options, torch.randn(B, H, Lq, D, dtype=kind)


def calls(problem: GroupedAttention, kind: torch.dtype, mode: str) -> dict[str, Function]:
    """fastgru and those of torch's backends that take the problem, each once found to compute the right numbers."""
    qkv, options, grad = tensors(problem, kind, mode == "training")

    def make(attention: Callable[..., Tensor]) -> Function:
        def forward() -> Any:
            with torch.inference_mode():
                return [attention(*qkv, **options)]

        def training() -> Any:
            output = attention(*qkv, **options)
            return [output, *torch.autograd.grad(output, qkv, grad)]

        return forward if mode == "forward" else training

    exact = [t.detach().double().requires_grad_(mode == "training") for t in qkv]
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(*exact, **options)
    want = [output, *torch.autograd.grad(output, exact, grad.double())] if mode == "training" else [output]
    functions = {"fastgru": make(fastgru.scaled_dot_product_attention)}
    functions |= {name: make(F.scaled_dot_product_attention) for name in PEERS}
    for name, function in list(functions.items()):
        with selected(name):
            try:
                got = function()
            except RuntimeError as error:
                if name == "fastgru" or "No available kernel" not in str(error):
                    raise
                del functions[name]
                continue
        for ours, theirs in zip(got, want, strict=True):
            error = ((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
            if not error < TOLERANCE[kind]:
                raise SystemExit(f"wrong numbers, nothing is timed: {name}, {problem}, {kind}, {mode}: error {error}")
    return functions


def block(function: Function, count: int) -> float:
    function()
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def measure(problem: GroupedAttention, name: str, mode: str, seconds: float) -> dict[str, Any]:
    """Medians in microseconds, and how many times as fast fastgru is as each peer and as the better one."""
    functions = calls(problem, dtype(name), mode)
    found = results(race(functions, block, block_seconds=0.004, seconds=seconds, least=5, most=60, selected=selected))
    best = min(found["speedup"], key=lambda peer: found["us"][peer])
    return {**problem._asdict(), "dtype": name, "mode": mode, "best": best, **found}


def table(seconds: float, threads: int, peak: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """The shapes of problems.py, with the share of the peak of float32 multiply-adds, taken beside each row."""
    for problem, mode, goals in CPU_ATTENTION_GOALS:
        for name, goal in goals.items():
            before = peak()
            row = measure(problem, name, mode, seconds)
            row["fma_peak_gflops"] = statistics.median([before, peak()])
            row["goal"] = goal
            row["gflops"] = problem.flops(mode) / row["us"]["fastgru"] / 1e3
            row["of_fma_peak"] = row["gflops"] / row["fma_peak_gflops"]
            # What any algorithm has to read and write at the least.
            row["gb_per_s"] = problem.bytes(2 if name == "bfloat16" else 4) / row["us"]["fastgru"] / 1e3
            yield row


def sweep(shapes: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Random shapes, causal or not, grouped heads, masks; inference and training in turn."""
    draw = random.Random(0)
    found = 0
    while found < shapes:
        B, H, group, D = (
            draw.choice([1, 2, 8]),
            draw.choice([1, 2, 4, 8]),
            draw.choice([1, 1, 1, 4]),
            draw.choice([16, 32, 40, 64, 80, 96, 128]),
        )
        Lq, Lk = (round(2 ** draw.uniform(0, 10)) for _ in range(2))
        if draw.random() < 0.4:
            Lk = Lq
        causal = draw.random() < 0.4
        mask = draw.choice(["", "", "keys", "scores"]) if not causal else ""
        if B * H * group * Lq * Lk * D > 2**29:
            continue
        problem = GroupedAttention(B, H * group, H, Lq, Lk, D, causal, mask)
        yield measure(problem, draw.choice(["float32", "bfloat16"]), MODES[found % 2], seconds)
        found += 1


MEMORY = """
import sys, torch, fastgru
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
name, mode, L, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
attention = fastgru.scaled_dot_product_attention if name == "fastgru" else F.scaled_dot_product_attention
def step(length):
    t = [torch.ones(1, 1, length, 64, requires_grad=mode == "training") for _ in range(3)]
    out = attention(*t)
    if mode == "training":
        out.sum().backward()
    return t, out
with sdpa_kernel([SDPBackend.MATH if name == "torch math" else SDPBackend.FLASH_ATTENTION]):
    step(64)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step(L)
print(status("VmHWM") - before)
"""


def memory(threads: int) -> Iterator[dict[str, Any]]:
    """Peak resident memory of one call beyond what the process held before, tensors included: one head, 64 columns."""
    for mode in MODES:
        for length in (1024, 2048, 4096, 8192, 16384):
            row: dict[str, Any] = {"mode": mode, "L": length, "bytes": {}}
            for name in ("fastgru", *PEERS):
                # Quadratic by construction: its peak at the greatest lengths would only fill the machine.
                if (name == "torch math" and length > 4096) or (mode == "training" and length > 8192):
                    continue
                command = [sys.executable, "-c", MEMORY, name, mode, str(length), str(threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row["bytes"][name] = int(done.stdout)
            if row["bytes"]:
                yield row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the sweep, by mode: speed-up over the better of torch's backends."""
    result = {}
    for mode in MODES:
        values = [row["speedup"][row["best"]]["median"] for row in rows if row["mode"] == mode]
        if values:
            result[mode] = {
                "shapes": len(values),
                "geometric_mean": geometric_mean(values),
                "worst": min(values),
                "below_one": sum(value < 1 for value in values),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", type=int, default=80, help="random shapes")
    parser.add_argument("--seconds", type=float, default=4, help="per row of the table; a tenth of it in the sweep")
    parser.add_argument("--only", nargs="+", choices=["table", "sweep", "memory"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = probes()

    def peak() -> float:
        return max(library.fma_peak(options.threads, 0.1) for _ in range(3)) / 1e9

    path = options.output / "cpu_attention.json"
    options.output.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if options.only and path.exists() else {}
    record |= {
        "benchmark": "cpu_attention",
        **_machine.origin(),
        "threads": options.threads,
    }
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "table": lambda: table(options.seconds, options.threads, peak),
        "memory": lambda: memory(options.threads),
        "sweep": lambda: sweep(options.shapes, options.seconds / 10),
    }
    for name in options.only or parts:
        record[name] = {"rows": []}
        for row in parts[name]():
            record[name]["rows"].append(row)
            if name == "sweep":
                record[name]["summary"] = summary(record[name]["rows"])
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
