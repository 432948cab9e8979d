"""The GRU on the CPU beside its peers and the roofline: one table, one JSON record, one picture.

    python benchmarks/cpu_gru.py [--rounds N] [--threads N] [--peers ...] [--output DIR]

Every round runs all peers, in an order that changes, each after a pause that lets the thread pool of the one before
go idle; a ratio is taken within its round, and the median of the rounds is the result. Nothing is timed before its
output has been compared with torch.nn.GRU in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peers import PeerMissingError
from peers_gru import FORWARD, TRAINING, Forward
from problems import CPU_GRU, Problem
from roofline import Limits, gru_limit, roofline
from timing import race, results
from torch import nn

from fastgru.cli import _machine

ROOT = Path(__file__).parents[1]
IDLE = 0.1  # seconds for a spinning thread pool to go to sleep; ONNX Runtime's takes more than 0.02
WAKING = 0.02  # seconds of calls, not timed, in which one wakes up and its threads spread over the cores


def block(function: Forward, calls: int) -> float:
    time.sleep(IDLE)
    awake = time.perf_counter() + WAKING
    while time.perf_counter() < awake:
        function()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def check(function: Forward, gru: nn.GRU, x: torch.Tensor) -> float:
    """Largest error against nn.GRU in float64; stops everything when it is not rounding."""
    exact = nn.GRU(gru.input_size, gru.hidden_size).double()
    exact.load_state_dict(gru.state_dict())
    with torch.no_grad():
        want = exact(x.double())[0]
    error = (torch.as_tensor(function()).double() - want).abs().max().item()
    if not error < 2e-5:
        raise SystemExit(f"wrong numbers, nothing is timed: error {error} at {tuple(x.shape)}")
    return error


def measure(problem: Problem, names: list[str], rounds: int, seconds: float, limits: Limits) -> dict[str, Any]:
    torch.manual_seed(0)
    T, B, I, H = problem
    gru = nn.GRU(I, H)
    x, grad = torch.randn(T, B, I), torch.randn(T, B, H)
    row: dict[str, Any] = {**problem._asdict(), "errors": {}}
    forward: dict[str, Forward] = {}
    for name in names:
        forward[name] = FORWARD[name](gru, x)
        with torch.inference_mode():
            row["errors"][name] = check(forward[name], gru, x)
    training = {name: TRAINING[name](gru, x, grad) for name in names if name in TRAINING}
    want, got = training["nn.GRU"](), training["fastgru"]()
    scale = max(g.abs().max().item() for g in want)
    row["errors"]["gradients beside nn.GRU, relative"] = (
        max((a - b).abs().max().item() for a, b in zip(want, got, strict=True)) / scale
    )

    threads = torch.get_num_threads()
    for mode, functions, flops in (
        ("forward", forward, problem.forward_flops),
        ("training", training, problem.training_flops),
    ):
        # As a loop of calls has it: entered once, and not for every call.
        with torch.inference_mode(mode == "forward"):
            times = race(functions, block, block_seconds=0.02, seconds=seconds, least=min(7, rounds), most=rounds)
        result = results(times)
        median = result["us"]["fastgru"] / 1e6
        result["gflops"] = flops / median / 1e9
        result["of_fma_peak"] = result["gflops"] / limits["fma_peak_gflops"]
        limit = gru_limit(problem, "cpu", "float32", threads, training=mode == "training")
        if mode == "forward" and limit.by == "memory":
            result["of_bandwidth"] = limit.seconds / median
        row[mode] = result
    return row


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and worst row of every speed-up."""
    result: dict[str, Any] = {}
    for mode in ("forward", "training"):
        for name in rows[0][mode]["speedup"]:
            values = [row[mode]["speedup"][name]["median"] for row in rows]
            result[f"{mode} beside {name}"] = {"geometric_mean": geometric_mean(values), "worst": min(values)}
    others = [name for name in ("ONNX Runtime", "OpenVINO") if name in rows[0]["forward"]["speedup"]]
    if others:
        best = [min(row["forward"]["speedup"][name]["median"] for name in others) for row in rows]
        result["forward beside the better of " + " and ".join(others)] = {
            "geometric_mean": geometric_mean(best),
            "worst": min(best),
        }
    return result


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for mode in ("forward", "training"):
        names = list(record["rows"][0][mode]["us"])
        table = Table(title=f"{mode}, float32, {record['threads']} threads, microseconds (speed-up of fastgru)")
        for column in (
            "T, B, I, H",
            *names,
            "GFLOP/s",
            "of FMA peak",
            *(["of bandwidth limit"] if mode == "forward" else []),
        ):
            table.add_column(column, justify="right")
        for row in record["rows"]:
            result = row[mode]
            cells = [f"{row['T']}, {row['B']}, {row['I']}, {row['H']}"]
            for name in names:
                ratio = result["speedup"].get(name)
                cells.append(f"{result['us'][name]:,.0f}" + (f" ({ratio['median']:.2f}x)" if ratio else ""))
            cells += [f"{result['gflops']:.0f}", f"{result['of_fma_peak']:.0%}"]
            if mode == "forward":
                cells.append(f"{result['of_bandwidth']:.0%}" if "of_bandwidth" in result else "")
            table.add_row(*cells)
        console.print(table)
    for name, values in record["summary"].items():
        console.print(f"{name}: {values['geometric_mean']:.2f}x (geometric mean), {values['worst']:.2f}x (worst row)")


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    labels = [f"{r['T']}, {r['B']}, {r['I']}, {r['H']}" for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, mode in zip(axes, ("forward", "training"), strict=True):
        names = list(rows[0][mode]["speedup"])
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            values = [r[mode]["speedup"][name] for r in rows]
            positions = [y + (i - (len(names) - 1) / 2) * height for y in range(len(rows))]
            middle = [v["median"] for v in values]
            spread = [[v["median"] - v["q1"] for v in values], [v["q3"] - v["median"] for v in values]]
            bars = axis.barh(positions, middle, height * 0.9, xerr=spread, label=name, ecolor="0.4")
            axis.bar_label(bars, [f"{m:.2f}" for m in middle], padding=4, fontsize=7)
        axis.axvline(1, color="0.3", linewidth=1)
        axis.set_xscale("log")
        axis.set_title({"forward": "forward", "training": "forward + backward"}[mode])
        axis.set_xlabel("times as fast as the peer")
        axis.margins(x=0.15)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), labels)
    axes[0].set_ylabel("T, B, I, H")
    axes[0].invert_yaxis()
    figure.suptitle(f"fastgru.GRU, float32, {record['threads']} threads, {record['machine']['cpu']}")
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=12, help="per shape and mode, once 7 rounds are done")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=["nn.GRU", "ONNX Runtime", "OpenVINO"], choices=list(FORWARD))
    parser.add_argument("--problems", nargs="+", metavar="T,B,I,H", help="default: the table in problems.py")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    problems = [Problem(*map(int, p.split(","))) for p in options.problems] if options.problems else CPU_GRU
    names = list(dict.fromkeys(["fastgru", "nn.GRU", *options.peers]))
    for name in list(names):
        try:
            FORWARD[name](nn.GRU(4, 4), torch.zeros(1, 1, 4))
        except PeerMissingError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            names.remove(name)

    record: dict[str, Any] = {
        "benchmark": "cpu_gru",
        **_machine.origin("onnxruntime", "openvino"),
        "threads": options.threads,
        "roofline": roofline(options.threads),
        "rows": [],
    }
    for problem in problems:
        print(problem, file=sys.stderr, flush=True)
        record["rows"].append(measure(problem, names, options.rounds, options.seconds, record["roofline"]))
        record["summary"] = summary(record["rows"])
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "cpu_gru.json").write_text(json.dumps(record, indent=1) + "\n")
    show(record)


if __name__ == "__main__":
    main()
