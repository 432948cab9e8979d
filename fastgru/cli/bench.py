"""``python -m fastgru bench``: nn.GRU against fastgru on the shapes you name."""

from __future__ import annotations

import argparse
import itertools
import json
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
    CommandError,
    backend_name,
    check_writable,
    device,
    positive,
    require,
    seconds,
    show_table,
    write_json,
)
from fastgru.cli._timing import latency, time_pair

MODES = {"forward": "fwd", "forward + backward": "fwd+bwd"}


def measure(problem: testing.GruProblem, budget: float) -> dict[str, Any]:
    """Both directions of one problem, after its numbers have been checked; not timed if they are wrong."""
    sizes = {"T": problem.T, "B": problem.B, "I": problem.I, "H": problem.H}
    dtype = str(problem.dtype).removeprefix("torch.")
    record: dict[str, Any] = {**sizes, "dtype": dtype, "broken": [], "times": {}, "latency_s": {}}
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
        time_both(record, "forward", calls, like.device, budget)
    steps = (training_step(baseline, input), training_step(candidate, input))
    time_both(record, "forward + backward", steps, like.device, budget)
    return record


def time_both(
    record: dict[str, Any],
    mode: str,
    calls: tuple[Callable[[], object], Callable[[], object]],
    device: torch.device,
    budget: float,
) -> None:
    """The ratio of nn.GRU and fastgru, from alternating rounds, and then how long single calls of each take."""
    record["times"][mode] = time_pair(*calls, device=device, seconds=budget).summary()
    record["latency_s"][mode] = {
        name: latency(call, device=device, seconds=budget / 4)
        for name, call in zip(("baseline", "candidate"), calls, strict=True)
    }


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


SIZES = ("T", "B", "I", "H", "dtype")
SETTINGS = ("layers", "bidirectional")


def read_record(path: Path) -> dict[str, Any]:
    """A record that an earlier run wrote with ``--json``.

    Raises:
        CommandError: the file cannot be read or is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--compare {path}: {error}") from error
    if not isinstance(record, dict) or record.get("command") != "bench":
        raise CommandError(f"--compare {path}: not a record of 'python -m fastgru bench --json'")
    return record


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[list[str]]:
    """Rows of every measurement that both records hold: the speed-up over nn.GRU then and now, and their ratio.

    Times of two runs differ by what else the machine did; a speed-up is taken against nn.GRU within the same run. It is
    flagged where even the quartiles of the two do not meet.
    """
    if any(old[name] != new[name] for name in SETTINGS):
        return []
    before = {tuple(result[name] for name in SIZES): result["times"] for result in old["results"]}
    rows = []
    for result in new["results"]:
        key = tuple(result[name] for name in SIZES)
        for mode, now in result["times"].items():
            then = before.get(key, {}).get(mode)
            if then is None:
                continue
            low, high = now["speedup_q1"] / then["speedup_q3"], now["speedup_q3"] / then["speedup_q1"]
            flag = "slower" if high < 1 else "faster" if low > 1 else ""
            speedups = [f"{then['speedup']:.2f}x", f"{now['speedup']:.2f}x"]
            ratio = [f"{now['speedup'] / then['speedup']:.2f}", f"{low:.2f}-{high:.2f}"]
            rows.append([",".join(str(part) for part in key[:4]), key[4], MODES[mode], *speedups, *ratio, flag])
    return rows


def plot(record: dict[str, Any], path: Path) -> None:
    """The speed-ups as bars, with their quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in record["results"] if result["times"]]
    figure, axis = plt.subplots(figsize=(8, 1.5 + 0.5 * len(results)), layout="constrained")
    for offset, mode in ((-0.2, "forward"), (0.2, "forward + backward")):
        times = [result["times"][mode] for result in results]
        middle = [time["speedup"] for time in times]
        spread = [
            [time["speedup"] - time["speedup_q1"] for time in times],
            [time["speedup_q3"] - time["speedup"] for time in times],
        ]
        places = [row + offset for row in range(len(results))]
        bars = axis.barh(places, middle, 0.38, xerr=spread, label=mode, ecolor="0.4")
        axis.bar_label(bars, [f"{value:.2f}x" for value in middle], padding=6, fontsize=8)
    labels = [f"{','.join(str(result[name]) for name in 'TBIH')} {result['dtype']}" for result in results]
    axis.set_yticks(range(len(results)), labels)
    axis.set_ylabel("T,B,I,H")
    axis.invert_yaxis()
    axis.axvline(1, color="0.3", linewidth=1)
    axis.margins(x=0.15)
    axis.set_xlabel("times as fast as torch.nn.GRU")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.savefig(path, dpi=140)


def run(args: argparse.Namespace) -> int:
    require("bench", "rich", *(["matplotlib"] if args.plot else []))
    from rich.console import Console
    from rich.progress import Progress

    for path in (args.json, args.plot):
        if path:
            check_writable(path)
    old = read_record(args.compare) if args.compare else None
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
            rows.append([*sizes, "not timed: wrong", *[""] * 6])
        for name, times in result["times"].items():
            rows.append(
                [
                    *sizes,
                    MODES[name],
                    f"{times['baseline_s'] * 1e3:.3g}",
                    f"{times['candidate_s'] * 1e3:.3g}",
                    f"{times['speedup']:.2f}x",
                    f"{times['speedup_q1']:.2f}-{times['speedup_q3']:.2f}",
                    *(_tail(result["latency_s"][name][who]) for who in ("baseline", "candidate")),
                ]
            )
    layers = f"{args.layers} layer(s){', bidirectional' if args.bidirectional else ''}"
    show_table(
        f"torch.nn.GRU against fastgru ({', '.join(sorted(set(backends.values())))}), {layers}, "
        f"{_place(args.device, machine)}; ms per call",
        ["T,B,I,H", "dtype", "", "nn.GRU", "fastgru", "speed-up", "quartiles", "nn.GRU p90/p99", "fastgru p90/p99"],
        rows,
        right=(0, 3, 4, 5, 6, 7, 8),
    )
    broken = [(result, line) for result in results for line in result["broken"]]
    for result, line in broken:
        print(f"T={result['T']} B={result['B']} I={result['I']} H={result['H']} {result['dtype']}: {line}")
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
    if args.json:
        write_json(args.json, record)
    if args.plot:
        plot(record, args.plot)
    if old is not None:
        columns = ["T,B,I,H", "dtype", "", "then", "now", "ratio", "spread", ""]
        compared = compare(old, record)
        if compared:
            show_table(f"Speed-up over nn.GRU, beside {args.compare}", columns, compared, right=(0, 3, 4, 5, 6))
        else:
            print(f"{args.compare} holds none of these problems: nothing to compare")
    return 1 if broken else 0


def _tail(latency: dict[str, float]) -> str:
    """What nine in ten and ninety-nine in a hundred calls take at most, in ms; the latter may be missing."""
    return "/".join(f"{latency[name] * 1e3:.3g}" if name in latency else "-" for name in ("p90", "p99"))


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
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups as PNG")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="the ratio to an earlier --json, changes flagged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with machine and versions")
    parser.set_defaults(run=run)
