"""What pytest-benchmark stores of the machine: its processor, not its name."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    for name in ("node", "release"):
        machine_info.pop(name, None)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for name in ("project", "branch"):
        output_json["commit_info"].pop(name, None)
