"""Turns results of bench_gru.py into the table that ``auto`` goes by.

    python benchmarks/gpu/make_table.py benchmarks/results/gpu_bench_gru.json [...]

Writes fastgru/backends/gpu_table.json. An architecture in the results replaces what the table had of it; others stay.
A backend that refused a problem, or broke the numeric rule, has null there. Where several GPUs of one architecture
were measured each has its row: a backend has to win on all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastgru.backends import gpu_table


def rows(results: list[dict[str, Any]]) -> dict[str, dict[str, list[list[Any]]]]:
    """The table's ``measured`` from records of bench_gru.py."""
    measured: dict[str, dict[str, list[list[Any]]]] = {}
    for result in results:
        for entry in result["entries"]:
            times = [entry["contenders"].get(name, {}).get("device_us") for name in gpu_table.BACKENDS]
            if times[-1] is None or times[:-1] == [None] * (len(times) - 1):
                continue
            sizes = [entry[name] for name in ("H", "B", "T", "directions", "training", "packed")]
            row = [*sizes, *(None if time is None else round(time, 2) for time in times)]
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
    parser.add_argument("results", type=Path, nargs="+", help="records of bench_gru.py")
    arguments = parser.parse_args()
    table = json.loads(gpu_table.PATH.read_text())
    table["measured"] |= rows([json.loads(path.read_text()) for path in arguments.results])
    write(table, gpu_table.PATH)
    count = sum(len(found) for precisions in table["measured"].values() for found in precisions.values())
    print(f"{count} rows written to {gpu_table.PATH}")


if __name__ == "__main__":
    main()
