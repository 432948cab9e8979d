"""Turns results of bench_gru.py into the table that ``auto`` goes by.

    python benchmarks/gpu/make_table.py benchmarks/results/gpu_bench_gru.json [...]

Writes fastgru/backends/gpu_table.json. An architecture in the results replaces what the table had of it; others stay.
Where a contender was refused, or several GPUs of one architecture were measured, only what all have in common stands:
Triton has to win on each of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastgru.backends import gpu_table


def rows(results: list[dict[str, Any]]) -> dict[str, dict[str, list[list[Any]]]]:
    """The table's ``measured`` from records of bench_gru.py: of equal problems the one least in Triton's favour."""
    worst: dict[tuple[str, str], dict[tuple[Any, ...], tuple[float, float]]] = {}
    for result in results:
        for entry in result["entries"]:
            times = [entry["contenders"][name].get("device_us") for name in ("triton", "cudnn")]
            if None in times:
                continue
            sizes = tuple(entry[name] for name in ("H", "B", "T", "directions", "training", "packed"))
            pair = (round(times[0], 2), round(times[1], 2))
            have = worst.setdefault((result["architecture"], entry["precision"]), {})
            have[sizes] = max(have.get(sizes, pair), pair, key=lambda p: p[0] / p[1])
    measured: dict[str, dict[str, list[list[Any]]]] = {}
    for (architecture, precision), found in sorted(worst.items()):
        measured.setdefault(architecture, {})[precision] = [[*sizes, *pair] for sizes, pair in sorted(found.items())]
    return measured


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
