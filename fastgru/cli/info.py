"""``python -m fastgru info``: what this installation is and what it can run, and why not where it cannot."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

import torch

from fastgru import backends
from fastgru.backends import registry
from fastgru.cli import _machine
from fastgru.cli._common import show_table, to_json

# Read by fastgru itself, then those of others that change what it does or how fast.
VARIABLES = (
    "FASTGRU_BACKEND",
    "FASTGRU_CPU_ISA",
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def collect() -> dict[str, Any]:
    """Everything the command prints; ``problems`` holds what is wrong with the settings."""
    problems = []
    try:
        _machine.current_isa()
    except ValueError as error:
        problems.append(str(error))
    chosen: dict[str, str | None] = {}
    with warnings.catch_warnings():
        # Why auto falls back is in the list above.
        warnings.simplefilter("ignore")
        for place in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            try:
                chosen[place] = backends.select("gru", place, torch.float32).name
            except (ValueError, backends.BackendUnavailable) as error:
                chosen[place] = None
                problems.append(str(error))
    return {
        "schema": 1,
        "command": "info",
        "versions": _machine.versions(),
        "commit": _machine.commit(),
        "machine": _machine.machine(),
        "backends": [
            {"name": backend.name, "devices": list(backend.devices), "why_not": backend.available()}
            for backend in registry.backends()
        ],
        "chosen": chosen,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "problems": problems,
    }


def run(args: argparse.Namespace) -> int:
    record = collect()
    if args.json:
        print(to_json(record))
    else:
        show(record)
    for problem in record["problems"]:
        print(f"fastgru info: {problem}", file=sys.stderr)
    return 2 if record["problems"] else 0


def show(record: dict[str, Any]) -> None:
    machine = record["machine"]
    rows = [[name, version or "not installed"] for name, version in record["versions"].items()]
    rows += [
        ["commit", record["commit"] or "installed package"],
        ["CPU", machine["cpu"]],
        ["cores, threads", f"{machine['cores']} cores, torch uses {machine['threads']} thread(s)"],
        ["instruction set", _instruction_set(machine)],
        ["small calls", _small_calls(machine["why_no_direct_calls"])],
        ["CUDA devices", ", ".join(machine["cuda_devices"]) or "none"],
        ["compiled library", _build(machine["build"])],
        ["CUDA part", _cuda_part(machine["cuda_part"])],
        ["system", machine["system"]],
    ]
    show_table("fastgru", ["", ""], rows)
    show_table(
        "Backends, best first",
        ["backend", "devices", "state"],
        [
            [item["name"], "all" if item["devices"] == ["*"] else ", ".join(item["devices"]), _state(item["why_not"])]
            for item in record["backends"]
        ],
    )
    for place, name in record["chosen"].items():
        print(f"float32 on {place} runs on: {name or 'nothing, see below'}")
    show_table(
        "Environment variables",
        ["variable", "value"],
        [[name, "not set" if value is None else value] for name, value in record["environment"].items()],
    )


def _instruction_set(machine: dict[str, Any]) -> str:
    if machine["isa"] is None:
        return f"none in use; usable: {', '.join(machine['usable_isas']) or 'none, there are no compiled kernels'}"
    return f"{machine['isa']} in use; usable: {', '.join(machine['usable_isas'])}"


def _small_calls(why_not: str | None) -> str:
    return "without torch's dispatcher" if why_not is None else f"through torch's dispatcher: {why_not}"


def _build(build: dict[str, str | None] | None) -> str:
    if build is None:
        return "none, or without a record of its build"
    commit = f"commit {build['commit']}" if build["commit"] else "not from a repository"
    return f"built by {build['compiler']} {build['flags']}, with torch {build['torch']}, {commit}"


def _cuda_part(part: dict[str, Any] | None) -> str:
    if part is None:
        return "not in this installation"
    driver = f"the driver runs CUDA {part['driver']}" if part["driver"] else "no driver here"
    return "; ".join([f"built with CUDA {part['built_with']}", driver, *part["devices"]])


def _state(why_not: str | None) -> str:
    return "available" if why_not is None else f"not available: {why_not}"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, CPU, GPUs, every backend with available or why not",
        description="Show what this installation is and what it can run: versions, CPU and instruction set, GPUs, "
        "every backend with the reason and the remedy where it is not available, and the environment variables in "
        "force. Needs torch alone.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)
