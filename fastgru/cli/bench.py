"""``python -m fastgru bench``: times torch and fastgru on the shapes you name, family by family."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import fastgru
from fastgru.cli import _machine
from fastgru.cli._bench_attention import ATTENTION
from fastgru.cli._bench_family import MODES, Family
from fastgru.cli._bench_gru import GRU
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

FAMILIES = {"gru": GRU, "attention": ATTENTION}


def measure(family: Family, problem: Any, budget: float, training: bool) -> dict[str, Any]:
    """One problem; a backend that was asked for and does not take it is the user's to know.

    Raises:
        CommandError: there is such a backend.
    """
    try:
        return family.measure(problem, budget, training)
    except fastgru.BackendUnavailable as error:
        raise CommandError(str(error)) from None


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
    """Rows of every measurement that both records hold: the speed-up over torch then and now, and their ratio.

    Times of two runs differ by what else the machine did; a speed-up is taken against torch within the same run. It is
    flagged where even the quartiles of the two do not meet.
    """
    # Records of before there were families are of the GRU.
    if old.get("family", "gru") != new["family"]:
        return []
    family = FAMILIES[new["family"]]
    if any(old[name] != new[name] for name in family.settings):
        return []
    before = {(family.label(result), result["dtype"]): result["times"] for result in old["results"]}
    rows = []
    for result in new["results"]:
        key = (family.label(result), result["dtype"])
        for mode, now in result["times"].items():
            then = before.get(key, {}).get(mode)
            if then is None:
                continue
            low, high = now["speedup_q1"] / then["speedup_q3"], now["speedup_q3"] / then["speedup_q1"]
            flag = "slower" if high < 1 else "faster" if low > 1 else ""
            speedups = [f"{then['speedup']:.2f}x", f"{now['speedup']:.2f}x"]
            ratio = [f"{now['speedup'] / then['speedup']:.2f}", f"{low:.2f}-{high:.2f}"]
            rows.append([*key, MODES[mode], *speedups, *ratio, flag])
    return rows


def plot(record: dict[str, Any], path: Path) -> None:
    """The speed-ups as bars, with their quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    family = FAMILIES[record["family"]]
    results = [result for result in record["results"] if result["times"]]
    modes = [mode for mode in MODES if results and mode in results[0]["times"]]
    figure, axis = plt.subplots(figsize=(8, 1.5 + 0.5 * len(results)), layout="constrained")
    for offset, mode in zip((-0.2, 0.2) if len(modes) == 2 else (0.0,), modes, strict=False):
        times = [result["times"][mode] for result in results]
        middle = [time["speedup"] for time in times]
        spread = [
            [time["speedup"] - time["speedup_q1"] for time in times],
            [time["speedup_q3"] - time["speedup"] for time in times],
        ]
        places = [row + offset for row in range(len(results))]
        bars = axis.barh(places, middle, 0.38, xerr=spread, label=mode, ecolor="0.4")
        axis.bar_label(bars, [f"{value:.2f}x" for value in middle], padding=6, fontsize=8)
    labels = [f"{family.label(result)} {result['dtype']}" for result in results]
    axis.set_yticks(range(len(results)), labels)
    axis.set_ylabel(",".join(family.sizes))
    axis.invert_yaxis()
    axis.axvline(1, color="0.3", linewidth=1)
    axis.margins(x=0.15)
    axis.set_xlabel(f"times as fast as {family.baseline}")
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
    family = FAMILIES[args.family]
    complete(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    backends = {name: backend_name(args.device, DTYPES[name]) for name in args.dtype}
    problems = family.problems(args)
    machine = _machine.machine()
    results = []
    # Drawn between the measurements: a thread that draws would take its time from them.
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("Timing", total=len(problems))
        progress.refresh()
        for problem in problems:
            results.append(measure(family, problem, args.seconds, args.training))
            progress.update(task, advance=1, refresh=True)
    show(args, family, results, f"({', '.join(sorted(set(backends.values())))})", machine)
    broken = [(result, line) for result in results for line in result["broken"]]
    for result, line in broken:
        print(" ".join(f"{name}={result[name]}" for name in family.sizes), f"{result['dtype']}: {line}")
    record = {
        "schema": 1,
        "command": "bench",
        "family": args.family,
        **_machine.origin(),
        "machine": machine,
        "device": str(args.device),
        "backends": backends,
        **{name: getattr(args, name) for name in family.settings},
        "results": results,
    }
    if args.json:
        write_json(args.json, record)
    if args.plot:
        plot(record, args.plot)
    if old is not None:
        columns = [",".join(family.sizes), "dtype", "", "then", "now", "ratio", "spread", ""]
        compared = compare(old, record)
        if compared:
            show_table(f"Speed-up over {family.short}, beside {args.compare}", columns, compared, right=(0, 3, 4, 5, 6))
        else:
            print(f"{args.compare} holds none of these problems: nothing to compare")
    return 1 if broken else 0


def complete(args: argparse.Namespace) -> None:
    """Give the options of the family that were not given their defaults.

    Raises:
        CommandError: an option of another family was given.
    """
    known = FAMILIES[args.family].defaults
    for name in sorted({name for family in FAMILIES.values() for name in family.defaults}):
        if name not in known and hasattr(args, name):
            raise CommandError(f"--{name.replace('_', '-')} is no option of --family {args.family}")
    for name, value in known.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def show(
    args: argparse.Namespace, family: Family, results: list[dict[str, Any]], backends: str, machine: dict[str, Any]
) -> None:
    """Print the results as a table: a row for each mode, and for each backend of torch's where there are several."""
    several = any("peers" in result for result in results)
    rows = []
    for result in results:
        sizes = [family.label(result), result["dtype"]]
        if result["broken"]:
            rows.append([*sizes, "not timed: wrong", *[""] * (7 if several else 6)])
        for mode, best in result["times"].items():
            for peer, times in result.get("peers", {}).get(mode, {"": best}).items():
                # Single calls are timed against the fastest.
                fastest = peer == best.get("peer", "")
                tails = [_tail(result["latency_s"][mode][who]) for who in ("baseline", "candidate")]
                rows.append(
                    [
                        *sizes,
                        MODES[mode],
                        *([peer] if several else []),
                        f"{times['baseline_s'] * 1e3:.3g}",
                        f"{times['candidate_s'] * 1e3:.3g}",
                        f"{times['speedup']:.2f}x",
                        f"{times['speedup_q1']:.2f}-{times['speedup_q3']:.2f}",
                        *(tails if fastest else ["", ""]),
                    ]
                )
    columns = [",".join(family.sizes), "dtype", "", *(["torch's"] if several else []), family.short, "fastgru"]
    columns += ["speed-up", "quartiles", f"{family.short} p90/p99", "fastgru p90/p99"]
    show_table(
        f"{family.baseline} against fastgru {backends}, {family.describe(args)}, "
        f"{_place(args.device, machine)}; ms per call",
        columns,
        rows,
        right=(0, *range(4 if several else 3, len(columns))),
    )


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
        help="time torch against fastgru on the shapes you name",
        description="Time torch.nn.GRU, or each backend of torch's scaled_dot_product_attention, and fastgru side by "
        "side, in alternating rounds in one process: forward in inference mode, and forward with backward (all "
        "gradients). Every combination of the sizes given is run. Numbers are checked first; a problem that fails is "
        "not timed.",
        epilog="Needs the 'demo' extra: pip install 'fastgru[demo]'. Exit code 1 if numbers are wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--family", choices=list(FAMILIES), default="gru", help="what to time")

    def add(group: argparse._ArgumentGroup, name: str, metavar: str, text: str, *, one: bool = False) -> None:
        # Which defaults apply depends on the family: complete().
        nargs = None if one else "+"
        group.add_argument(name, type=positive, nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=text)

    sizes = parser.add_argument_group("sizes")
    add(sizes, "--batch", "B", "sequences (default: 1 8)")
    add(sizes, "--seq", "T", "steps, or queries (default: 64 steps, 512 queries)")
    gru = parser.add_argument_group("sizes of --family gru")
    add(gru, "--hidden", "H", "hidden units (default: 128 256)")
    add(gru, "--input", "I", "input features (default: 128)")
    add(gru, "--layers", "L", "layers (default: 1)", one=True)
    gru.add_argument("--bidirectional", action="store_true", default=argparse.SUPPRESS, help="both directions")
    attention = parser.add_argument_group("sizes of --family attention")
    add(attention, "--heads", "H", "heads of the queries (default: 8)")
    add(attention, "--kv-heads", "H", "heads of keys and values (default: as many)", one=True)
    add(attention, "--keys", "L", "keys (default: as many as queries)")
    add(attention, "--dim", "D", "columns of a head (default: 64)")
    attention.add_argument("--causal", action="store_true", default=argparse.SUPPRESS, help="a query sees no later key")
    attention.add_argument(
        "--training",
        action="store_true",
        default=argparse.SUPPRESS,
        help="backward, too (the GRU's always is timed)",
    )
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
