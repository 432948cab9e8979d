"""Turns results of bench_gru.py and bench_attention.py into the tables that ``auto`` goes by.

    python benchmarks/gpu/make_table.py benchmarks/results/gpu_bench_gru.json [...]

Writes fastgru/backends/gpu_table.json and, of attention, attention_table.json. An architecture in the results replaces
what the table had of it; others stay. Where a contender was refused, or several GPUs of one architecture were
measured, only what all have in common stands: the first contender has to win on each of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastgru.backends import gluon, gpu_table

# Of a stage: the table it fills, the names in its entries of what a row begins with, and the two whose times end it.
TABLES = {
    "bench_gru": (gpu_table.PATH, ("H", "B", "T", "directions", "training", "packed"), ("triton", "cudnn")),
    "attention": (gluon.TABLE, ("D", "L", "causal"), ("gluon", "triton")),
}


def rows(results: list[dict[str, Any]], stage: str = "bench_gru") -> dict[str, dict[str, list[list[Any]]]]:
    """The table's ``measured`` from records of one stage: of equal problems the one least in the first one's favour."""
    _, names, pair_of = TABLES[stage]
    worst: dict[tuple[str, str], dict[tuple[Any, ...], tuple[float, float]]] = {}
    for result in results:
        for entry in result["entries"]:
            times = [entry["contenders"][name].get("device_us") for name in pair_of]
            if None in times:
                continue
            sizes = tuple(entry[name] for name in names)
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
