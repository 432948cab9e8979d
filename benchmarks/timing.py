"""Device time beside host time, by events: what a call costs the GPU, and what it costs to submit it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


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
