"""Measures two callables side by side, so that what the machine does to one it does to the other.

A ratio of medians from two separate runs moves with the clock rate, the neighbours and the temperature. Here the two
run alternately, in rounds of a few milliseconds, and the ratio is taken inside each round; the median of those ratios
is the result and their quartiles say how far to trust it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Callback = Callable[[], object]


@dataclass
class Pair:
    """Times in seconds of the baseline and of the candidate, one entry per round."""

    baseline: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)

    def add(self, baseline: float, candidate: float) -> None:
        self.baseline.append(baseline)
        self.candidate.append(candidate)

    def summary(self) -> dict[str, float | int]:
        """Medians, and median and quartiles of the per-round speed-up (baseline / candidate)."""
        ratios = [a / b for a, b in zip(self.baseline, self.candidate, strict=True)]
        low, _, high = quartiles(ratios)
        return {
            "rounds": len(ratios),
            "baseline_s": statistics.median(self.baseline),
            "candidate_s": statistics.median(self.candidate),
            "speedup": statistics.median(ratios),
            "speedup_q1": low,
            "speedup_q3": high,
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, q2, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, q2, q3


def percentiles(values: list[float]) -> dict[str, float]:
    """What half, nine in ten and ninety-nine in a hundred are at most: ``p50``, ``p90`` and ``p99``.

    One that fewer than a whole value would lie beyond is a guess, and left out.
    """
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else []
    return {f"p{p}": cuts[p - 1] for p in (50, 90, 99) if len(values) * (100 - p) >= 100}


def stopwatch(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits for the work queued on ``device``."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def time_pair(
    baseline: Callback, candidate: Callback, *, device: torch.device, seconds: float, min_rounds: int = 7
) -> Pair:
    """Measure both for about ``seconds`` together and at least ``min_rounds`` rounds.

    A round runs one of them a few times, then the other as often; which goes first alternates. Times are per call.
    """
    clock = stopwatch(device)

    def block(function: Callback, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    # The first call allocates and packs; the second is representative enough to size the blocks by.
    for function in (baseline, candidate):
        block(function, 1)
    per_call = block(baseline, 1) + block(candidate, 1)
    # A block of 2 ms is 20,000 ticks of the clock and short against whatever else the machine is doing.
    calls = max(1, math.ceil(4e-3 / per_call))
    rounds = max(min_rounds, math.ceil(seconds / (calls * per_call)))

    pair = Pair()
    deadline = clock() + seconds
    for i in range(rounds):
        if i % 2:
            second = block(candidate, calls)
            pair.add(block(baseline, calls), second)
        else:
            first = block(baseline, calls)
            pair.add(first, block(candidate, calls))
        if i + 1 >= min_rounds and clock() > deadline:
            break
    return pair


def latency(function: Callback, *, device: torch.device, seconds: float) -> dict[str, float]:
    """Single calls for about ``seconds``: percentiles of the time until the result is there.

    On a GPU also the median time between events before and after the call on the GPU (``device``), which leaves out
    what the host adds.
    """
    clock = stopwatch(device)
    times: list[float] = []
    on_device: list[float] = []
    deadline = clock() + seconds
    while len(times) < 20 or (len(times) < 1000 and clock() < deadline):
        start = clock()
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            function()
            after.record()
            times.append(clock() - start)
            on_device.append(before.elapsed_time(after) / 1e3)
        else:
            function()
            times.append(clock() - start)
    return percentiles(times) | ({"device": statistics.median(on_device)} if on_device else {})
