"""Turns results of bench_gru.py and bench_attention.py into the tables that ``auto`` goes by.

    python benchmarks/gpu/make_table.py benchmarks/results/gpu_bench_gru.json [...]

Writes fastgru/backends/measured_gru.json and, of attention, measured_attention.json. An architecture in the results
replaces what the table had of it; others stay. A backend that refused a problem, or broke the numeric rule, has null
there. Where several GPUs of one architecture were measured each has its row: a backend has to win on all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastgru.backends import measured
from fastgru.ops.attention import gluon

# Of a stage: the table it fills, the names in its entries of what a row begins with, and the contenders whose times end
# it, the one that all others are compared with last; "gluon.backward" is the backward pass of gluon.
TABLES = {
    "bench_gru": (measured.PATH, ("H", "B", "T", "directions", "training", "packed"), measured.BACKENDS),
    "attention": (gluon.TABLE, ("D", "L", "causal"), ("gluon", "triton", "gluon.backward", "triton.backward")),
}


def rows(results: list[dict[str, Any]], stage: str = "bench_gru") -> dict[str, dict[str, list[list[Any]]]]:
    """The table's ``measured`` from records of one stage."""
    _, names, contenders = TABLES[stage]

    def time_of(entry: dict[str, Any], contender: str) -> float | None:
        name, _, part = contender.partition(".")
        found = entry["contenders"].get(name, {})
        time: float | None = (found.get(part, {}) if part else found).get("device_us")
        return time

    measured: dict[str, dict[str, list[list[Any]]]] = {}
    for result in results:
        for entry in result["entries"]:
            times = [time_of(entry, name) for name in contenders]
            if times[-1] is None or times[0] is times[-2] is None:
                continue
            row = [*(entry[name] for name in names), *(None if time is None else round(time, 2) for time in times)]
            measured.setdefault(result["architecture"], {}).setdefault(entry["precision"], []).append(row)
    for precisions in measured.values():
        for found in precisions.values():
            found.sort(key=lambda row: [-1 if value is None else value for value in row])
    return {name: dict(sorted(precisions.items())) for name, precisions in sorted(measured.items())}


def write(table: dict[str, Any], path: Path) -> None:
    """One row per line, so that a change of one measurement is a change of one line."""
    lines = []
    for architecture, precisions in table["measured"].items():
        inner = [
            f"      {json.dumps(name)}: [\n" + ",\n".join(f"        {json.dumps(row)}" for row in found) + "\n      ]"
            for name, found in precisions.items()
        ]
        lines.append(f"    {json.dumps(architecture)}: {{\n" + ",\n".join(inner) + "\n    }")
    body = "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"
    columns = json.dumps(table["columns"])
    path.write_text(f'{{\n  "schema": {table["schema"]},\n  "columns": {columns},\n  "measured": {body}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="records of bench_gru.py or bench_attention.py")
    results = [json.loads(path.read_text()) for path in parser.parse_args().results]
    for stage, (path, _, _) in TABLES.items():
        table = json.loads(path.read_text())
        table["measured"] |= rows([result for result in results if result["stage"] == stage], stage)
        write(table, path)
        count = sum(len(found) for precisions in table["measured"].values() for found in precisions.values())
        print(f"{count} rows in {path}")


if __name__ == "__main__":
    main()
