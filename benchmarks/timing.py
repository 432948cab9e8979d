"""How the tables time: peers in turns, and on a GPU device time, by events, with the host's time to submit a call."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastgru.cli._timing import quartiles

Function = Callable[[], Any]


def race(
    functions: dict[str, Function],
    block: Callable[[Function, int], float],
    *,
    block_seconds: float,
    seconds: float,
    least: int,
    most: int,
    selected: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Seconds per call of every function in every round.

    Every round runs all of them, in an order that changes; rounds go on for about ``seconds``, from ``least`` to
    ``most``.

    Args:
        block: seconds per call of a function called so many times.
        block_seconds: how long one such block is to take.
        selected: what a function is called in, by its name.
    """
    counts = {}
    for name, function in functions.items():
        with selected(name):
            once = min(block(function, 1) for _ in range(2))
            counts[name] = max(1, math.ceil(block_seconds / once))
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, done = time.perf_counter(), 0
    while done < least or (done < most and time.perf_counter() - start < seconds):
        order = list(functions)
        random.Random(done).shuffle(order)
        for name in order:
            with selected(name):
                times[name].append(block(functions[name], counts[name]))
        done += 1
    return times


def results(times: dict[str, list[float]]) -> dict[str, Any]:
    """Of a race: the rounds, medians in microseconds, and how many times as fast fastgru is as each peer.

    A ratio is taken within its round; the median of the rounds is the result, with its quartiles.
    """
    ours = times["fastgru"]
    found: dict[str, Any] = {"rounds": len(ours), "speedup": {}}
    found["us"] = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    for name, values in times.items():
        if name != "fastgru":
            q1, q2, q3 = quartiles([theirs / own for theirs, own in zip(values, ours, strict=True)])
            found["speedup"][name] = {"median": q2, "q1": q1, "q3": q3}
    return found


def device_time(call: Callable[[], Any], budget: float = 0.15) -> dict[str, float]:
    """Median device time of a call, and the host's time to submit it, in microseconds."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    rounds = max(5, min(50, int(budget / (time.perf_counter() - start))))
    device, host = [], []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        after.record()
        torch.cuda.synchronize()
        device.append(before.elapsed_time(after) * 1e3)
    return {"device_us": statistics.median(device), "host_us": statistics.median(host) * 1e6, "rounds": rounds}


def peak_bytes(call: Callable[[], Any]) -> int:
    """GPU memory that a call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
