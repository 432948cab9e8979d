"""Peak memory of training steps on the CPU, beyond what the process held before them, in a process of its own.

    python benchmarks/memory.py gru "fastgru, save_gates=False" 64 32 256 256 [--threads N]
    python benchmarks/memory.py attention torch 1 8 1024 1024 64

Sizes are T, B, I, H, or B, H, Lq, Lk, D.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgru


def gru(peer: str, sizes: Sequence[int]) -> Callable[[], Any]:
    T, B, I, H = sizes
    options = {"save_gates": False} if peer == "fastgru, save_gates=False" else {}
    module = nn.GRU(I, H) if peer == "nn.GRU" else fastgru.GRU(I, H, **options)
    x = torch.randn(T, B, I)

    def step() -> None:
        module.zero_grad()
        module(x)[0].sum().backward()

    return step


def attention(peer: str, sizes: Sequence[int]) -> Callable[[], Any]:
    B, H, Lq, Lk, D = sizes
    function = F.scaled_dot_product_attention if peer == "torch" else fastgru.scaled_dot_product_attention
    inputs: tuple[Tensor, ...] = tuple(torch.randn(B, H, L, D, requires_grad=True) for L in (Lq, Lk, Lk))
    return lambda: torch.autograd.grad(function(*inputs).sum(), inputs)


STEPS = {"gru": (gru, (2, 2, 4, 4)), "attention": (attention, (1, 1, 2, 2, 8))}
PEERS = {"gru": ("fastgru", "fastgru, save_gates=False", "nn.GRU"), "attention": ("fastgru", "torch")}


def status(key: str) -> int:
    """Bytes of a line in this process's own account."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def peak_bytes(kind: str, peer: str, sizes: Sequence[int], threads: int) -> int:
    """What the steps of ``peer`` at ``sizes`` take, measured in a process that does nothing else."""
    command = [sys.executable, __file__, kind, peer, *map(str, sizes), "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=STEPS)
    parser.add_argument("peer", choices=sorted({peer for peers in PEERS.values() for peer in peers}))
    parser.add_argument("sizes", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    build, smallest = STEPS[options.kind]
    # What is loaded and started once is not of the step.
    build(options.peer, smallest)()
    step = build(options.peer, options.sizes)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before = status("VmRSS")
    for _ in range(3):
        step()
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
