"""``python -m fastgru bench``: nn.GRU against fastgru on the shapes you name."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastgru
from fastgru import testing
from fastgru.cli import _machine
from fastgru.cli._common import (
    DTYPES,
    backend_name,
    check_writable,
    device,
    positive,
    require,
    seconds,
    show_table,
    write_json,
)
from fastgru.cli._timing import time_pair


def measure(problem: testing.GruProblem, budget: float) -> dict[str, Any]:
    """Both directions of one problem, after its numbers have been checked; not timed if they are wrong."""
    sizes = {"T": problem.T, "B": problem.B, "I": problem.I, "H": problem.H}
    dtype = str(problem.dtype).removeprefix("torch.")
    record: dict[str, Any] = {**sizes, "dtype": dtype, "broken": [], "times": {}}
    record["broken"] = [str(comparison) for comparison in testing.parity(problem) if not comparison.ok]
    if record["broken"]:
        return record

    torch.manual_seed(problem.seed)
    shape = (problem.I, problem.H, problem.num_layers)
    options: dict[str, Any] = {
        "bidirectional": problem.bidirectional,
        "dtype": problem.dtype,
        "device": problem.device,
    }
    baseline, candidate = nn.GRU(*shape, **options), fastgru.GRU(*shape, **options)
    candidate.load_state_dict(baseline.state_dict())
    like = baseline.weight_hh_l0
    assert isinstance(like, Tensor)
    input = torch.randn(problem.T, problem.B, problem.I).to(like)
    with torch.inference_mode():
        calls = (lambda: baseline(input), lambda: candidate(input))
        record["times"]["forward"] = time_pair(*calls, device=like.device, seconds=budget).summary()
    steps = (training_step(module, input) for module in (baseline, candidate))
    record["times"]["forward + backward"] = time_pair(*steps, device=like.device, seconds=budget).summary()
    return record


def training_step(module: nn.RNNBase, input: Tensor) -> Callable[[], object]:
    """A callable that computes the gradients of input, initial state and all weights."""
    directions = 2 if module.bidirectional else 1
    x = input.clone().requires_grad_()
    hx = input.new_zeros(module.num_layers * directions, input.size(1), module.hidden_size, requires_grad=True)
    sources = [x, hx, *module.parameters()]
    upstream = (
        torch.randn(*input.shape[:2], directions * module.hidden_size).to(input),
        torch.randn(hx.shape).to(input),
    )
    return lambda: torch.autograd.grad(module(x, hx), sources, upstream)


def run(args: argparse.Namespace) -> int:
    require("bench", "rich")
    from rich.console import Console
    from rich.progress import Progress

    if args.json:
        check_writable(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    backends = {name: backend_name(args.device, DTYPES[name]) for name in args.dtype}
    grid = itertools.product(args.dtype, args.seq, args.batch, args.input, args.hidden)
    problems = [
        testing.GruProblem(
            T=seq,
            B=batch,
            I=width,
            H=hidden,
            num_layers=args.layers,
            bidirectional=args.bidirectional,
            hx=False,
            dtype=DTYPES[dtype],
            device=str(args.device),
        )
        for dtype, seq, batch, width, hidden in grid
    ]
    machine = _machine.machine()
    results = []
    # Drawn between the measurements: a thread that draws would take its time from them.
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("Timing", total=len(problems))
        progress.refresh()
        for problem in problems:
            results.append(measure(problem, args.seconds))
            progress.update(task, advance=1, refresh=True)
    rows = []
    for result in results:
        sizes = [",".join(str(result[name]) for name in "TBIH"), result["dtype"]]
        if result["broken"]:
            rows.append([*sizes, "not timed: wrong", "", "", "", ""])
        for name, times in result["times"].items():
            rows.append(
                [
                    *sizes,
                    {"forward": "fwd", "forward + backward": "fwd+bwd"}[name],
                    f"{times['baseline_s'] * 1e3:.3g}",
                    f"{times['candidate_s'] * 1e3:.3g}",
                    f"{times['speedup']:.2f}x",
                    f"{times['speedup_q1']:.2f}-{times['speedup_q3']:.2f}",
                ]
            )
    layers = f"{args.layers} layer(s){', bidirectional' if args.bidirectional else ''}"
    show_table(
        f"torch.nn.GRU against fastgru ({', '.join(sorted(set(backends.values())))}), {layers}, "
        f"{_place(args.device, machine)}; ms per call",
        ["T,B,I,H", "dtype", "", "nn.GRU", "fastgru", "speed-up", "quartiles"],
        rows,
        right=(0, 3, 4, 5, 6),
    )
    broken = [(result, line) for result in results for line in result["broken"]]
    for result, line in broken:
        print(f"T={result['T']} B={result['B']} I={result['I']} H={result['H']} {result['dtype']}: {line}")
    if args.json:
        record = {
            "schema": 1,
            "command": "bench",
            "machine": machine,
            "versions": _machine.versions(),
            "commit": _machine.commit(),
            "device": str(args.device),
            "backends": backends,
            "layers": args.layers,
            "bidirectional": args.bidirectional,
            "results": results,
        }
        write_json(args.json, record)
    return 1 if broken else 0


def _place(place: torch.device, machine: dict[str, Any]) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{machine['cpu']}, {machine['isa'] or 'no compiled kernels'}, {machine['threads']} thread(s)"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="time nn.GRU against fastgru on the shapes you name",
        description="Time torch.nn.GRU and fastgru side by side, in alternating rounds in one process: forward in "
        "inference mode, and forward with backward (gradients of input, initial state and weights). Every combination "
        "of the sizes given is run. Numbers are checked first; a problem that fails is not timed.",
        epilog="Needs the 'demo' extra: pip install 'fastgru[demo]'. Exit code 1 if numbers are wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--hidden", type=positive, nargs="+", default=[128, 256], metavar="H", help="hidden units")
    parser.add_argument("--input", type=positive, nargs="+", default=[128], metavar="I", help="input features")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8], metavar="B", help="sequences")
    parser.add_argument("--seq", type=positive, nargs="+", default=[64], metavar="T", help="steps")
    parser.add_argument("--layers", type=positive, default=1, metavar="L", help="layers")
    parser.add_argument("--bidirectional", action="store_true", help="both directions")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["float32"], help="dtypes")
    parser.add_argument(
        "--threads", type=positive, default=None, metavar="N", help="CPU threads; torch's own choice if not given"
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="time for each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine and versions")
    parser.set_defaults(run=run)
