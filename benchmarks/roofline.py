"""What the machine can do at best, probed in the run that is compared with it, and how near to that a result comes.

A limit is the time in which nothing could be faster: the products at the peak of multiply-adds, or the data at the
speed at which they can be read, whichever takes longer.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from problems import Attention, Problem
from timing import device_time

SOURCE = Path(__file__).with_suffix(".cpp")
# KiB per core: inside and beyond every level of cache.
SIZES = (16, 256, 512, 768, 1536, 3072, 6144, 16384, 65536)
Limits = dict[str, Any]


class Limit(NamedTuple):
    """The least seconds, and what takes them: ``compute`` or ``memory``."""

    seconds: float
    by: str


def probes() -> ctypes.CDLL:
    """The probes of roofline.cpp, compiled unless they are newer than their source."""
    library = SOURCE.parent / "build/roofline.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-march=native", "-ffp-contract=fast"]
        compiler += ["-shared", "-fPIC", "-pthread"]
        subprocess.run([*compiler, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(library)
    loaded = ctypes.CDLL(str(library))
    for name, arguments in (("fma_peak", ()), ("bf16_peak", ()), ("read_bandwidth", (ctypes.c_size_t,))):
        getattr(loaded, name).argtypes = (ctypes.c_int, *arguments, ctypes.c_double)
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


def caches() -> dict[str, int]:
    """KiB of each level of data cache that a core sees, as the system tells."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1])
    return found


@functools.cache
def roofline(threads: int, seconds: float = 0.1) -> Limits:
    """Of ``threads`` cores together: the peak of multiply-adds, and read bandwidth by the size of what each reads.

    ``levels`` names the bandwidths: the best that is read from each level of cache, and from beyond them all.
    """
    library = probes()

    def best(probe: Callable[..., float], *size: int) -> float:
        return max(probe(threads, *size, seconds) for _ in range(5)) / 1e9

    fma, bf16 = best(library.fma_peak), best(library.bf16_peak)
    rates = {kib: best(library.read_bandwidth, kib * 1024) for kib in SIZES}
    levels, last = {}, 0.0
    for level, kib in caches().items():
        # The last level is shared; half of one, or of a thread's share, still fits beside what else runs.
        inside = [rate for size, rate in rates.items() if last < size <= kib / (2 if level != "L3" else threads)]
        if inside:
            levels[level] = max(inside)
        last = kib
    levels["DRAM"] = rates[SIZES[-1]]
    return {
        "fma_peak_gflops": fma,
        "bf16_peak_gflops": max(fma, bf16),
        "read_gb_per_s": {str(kib): rate for kib, rate in rates.items()},
        "levels_gb_per_s": levels,
    }


def bandwidth(limits: Limits, bytes_per_core: float) -> float:
    """GB/s of the smallest measured size that is not below ``bytes_per_core``."""
    for kib, rate in limits["read_gb_per_s"].items():
        if int(kib) * 1024 >= bytes_per_core:
            return float(rate)
    return float(rate)


@functools.cache
def gpu_roofline() -> Limits:
    """Of the current GPU: bytes per second of a copy, read and write counted, and operations per second of products."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    limits = {"copy_gb_per_s": 2 * source.numel() / device_time(lambda: target.copy_(source))["device_us"] / 1e3}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        product = device_time(functools.partial(torch.matmul, a, a))["device_us"]
        limits[f"{str(dtype).removeprefix('torch.')}_matmul_tflops"] = 2 * 8192**3 / product / 1e6
    return limits


def _rates(device: str, dtype: str, threads: int) -> tuple[float, Callable[[float], float]]:
    """Operations per second, and bytes per second as a function of how many there are."""
    if device == "cuda":
        limits = gpu_roofline()
        return limits[f"{dtype}_matmul_tflops"] * 1e12, lambda _: limits["copy_gb_per_s"] * 1e9
    limits = roofline(threads)
    peak = limits["bf16_peak_gflops" if dtype == "bfloat16" else "fma_peak_gflops"]
    return peak * 1e9, lambda size: bandwidth(limits, size / threads) * 1e9


def _longer(compute: float, memory: float) -> Limit:
    return Limit(compute, "compute") if compute >= memory else Limit(memory, "memory")


def gru_limit(problem: Problem, device: str, dtype: str, threads: int, training: bool) -> Limit:
    """The products of the input and of the recurrence at the peak; or the weights of each, read as often as they must.

    On a CPU the recurrent weights are read in every step, from the level of cache that holds them; a GPU can keep them
    on chip and reads everything once. Training is three times the products, and twice the reads of the weights.
    """
    T, B, I, H = problem
    peak, read = _rates(device, dtype, threads)
    item = 4 if dtype == "float32" else 2
    once = item * (3.0 * H * (I + H) + T * B * (I + H))
    products = problem.forward_flops * (3 if training else 1) / peak
    if device == "cuda":
        return _longer(products, once * (2 if training else 1) / read(once))
    # The product of the input is one for all steps, at the peak; a single step reads both matrices instead.
    step = item * 3.0 * H * (H if T > 1 else H + I)
    weights = T * step / read(step) * (2 if training else 1)
    beside = 6.0 * T * B * H * I * (3 if training else 1) / peak if T > 1 else 0.0
    return _longer(products, weights + beside)


def attention_limit(shape: Attention, device: str, dtype: str, threads: int, training: bool) -> Limit:
    """Two products forward and five more backward (the scores are computed again) at the peak; or q, k, v, read."""
    B, H, Lq, Lk, D = shape
    peak, read = _rates(device, dtype, threads)
    item = 4 if dtype == "float32" else 2
    bytes_read = item * B * H * (Lq + 2.0 * Lk) * D
    products = 2.0 * B * H * Lq * Lk * D * (7 if training else 2) / peak
    return _longer(products, bytes_read / read(bytes_read) * (2 if training else 1))
