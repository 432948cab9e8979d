"""How the suite times, and what it stores beside the times: the machine, its limits, percentiles, what was reached."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory
import pytest
import roofline
import timing
import torch
from problems import Attention, Problem
from pytest_benchmark.fixture import BenchmarkFixture

from fastgru.cli import _machine
from fastgru.cli._timing import percentiles

HERE = Path(__file__).parent
OPERATIONS: dict[type, tuple[str, Callable[..., roofline.Limit]]] = {
    Problem: ("GRU", roofline.gru_limit),
    Attention: ("attention", roofline.attention_limit),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Peers warn of what is none of our business; only the test suite makes errors of warnings.
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # The processor, not the machine's name.
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info["cpu"] = {name: machine_info["cpu"].get(name) for name in ("brand_raw", "count")}
    origin = _machine.origin("onnxruntime", "openvino", "keras", "flash-attn")
    machine_info.update(machine=origin["machine"], versions=origin["versions"], limits={})
    if roofline.roofline.cache_info().currsize:
        machine_info["limits"]["cpu"] = roofline.roofline(torch.get_num_threads())
    if roofline.gpu_roofline.cache_info().currsize:
        machine_info["limits"]["gpu"] = roofline.gpu_roofline()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for name in ("project", "branch"):
        output_json["commit_info"].pop(name, None)
    # Every single call: a megabyte in all. The percentiles stay.
    for item in output_json["benchmarks"]:
        item["stats"].pop("data", None)


@pytest.fixture
def timed(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Times single calls of a function for about --benchmark-max-time and stores what they reach.

    One call is one round: a mean over several would hide the slow ones. ``weighed``: on a CPU the peak of the memory of
    a training step, too.
    """

    def measure(
        function: Callable[[], Any],
        *,
        problem: Problem | Attention,
        device: str,
        dtype: str,
        peer: str,
        training: bool,
        of_allowed_error: float,
        weighed: bool = False,
    ) -> None:
        name, limit_of = OPERATIONS[type(problem)]
        threads = torch.get_num_threads()
        limit = limit_of(problem, device, dtype, threads, training)
        mode = "forward + backward" if training else "forward"
        benchmark.group = f"{name}, {mode}, {device}, {dtype}, {problem}"
        benchmark.extra_info.update(problem=str(problem), peer=peer, of_allowed_error=of_allowed_error)
        if weighed and device == "cpu" and peer in memory.PEERS[name.lower()]:
            benchmark.extra_info["peak_bytes"] = memory.peak_bytes(name.lower(), peer, problem, threads)
        call = function
        if device == "cuda":
            benchmark.extra_info.update({**timing.device_time(function), "peak_bytes": timing.peak_bytes(function)})

            def call() -> None:
                function()
                torch.cuda.synchronize()

        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        budget, least = (pytestconfig.getoption(f"benchmark_{name}") for name in ("max_time", "min_rounds"))
        rounds = min(1000, max(int(least), math.ceil(float(budget) / once)))
        benchmark.pedantic(call, rounds=rounds, iterations=1)
        if benchmark.disabled:
            return
        seconds = benchmark.stats.stats.sorted_data
        taken = benchmark.extra_info.get("device_us", statistics.median(seconds) * 1e6) / 1e6
        benchmark.extra_info.update(
            {f"{name}_us": value * 1e6 for name, value in percentiles(seconds).items()},
            gflops=(problem.training_flops if training else problem.forward_flops) / taken / 1e9,
            of_limit=limit.seconds / taken,
            limited_by=limit.by,
        )

    return measure
