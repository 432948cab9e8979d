"""Times fastgru.scaled_dot_product_attention and the backends of torch's own."""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru
from fastgru import testing
from fastgru.cli._bench_family import Family, time_single_calls
from fastgru.cli._common import DTYPES, CommandError
from fastgru.cli._timing import time_pair

#: The backends of torch, and where they run.
PEERS = {
    "flash": (SDPBackend.FLASH_ATTENTION, ("cpu", "cuda")),
    "memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    "math": (SDPBackend.MATH, ("cpu", "cuda")),
}
# The oracle holds a dozen float64 tensors of as many numbers: 400 MB.
_MOST_SCORES_CHECKED = 1 << 22
# Bytes that the scores of torch's math backend may take.
_MOST_BYTES_OF_SCORES = 4 << 30


def problems(args: argparse.Namespace) -> list[testing.AttentionProblem]:
    """Every combination of the sizes."""
    found = []
    grid = itertools.product(args.dtype, args.batch, args.heads, args.seq, args.keys or [None], args.dim)
    for dtype, batch, heads, seq, keys, dim in grid:
        groups = args.kv_heads or heads
        if heads % groups:
            raise CommandError(f"--heads {heads} is not a multiple of --kv-heads {groups}")
        found.append(
            testing.AttentionProblem(
                B=batch,
                Hq=heads,
                Hk=groups,
                Lq=seq,
                Lk=keys or seq,
                D=dim,
                Dv=dim,
                causal=args.causal,
                align="top_left",
                sdpa=True,
                dtype=DTYPES[dtype],
                device=str(args.device),
            )
        )
    return found


def checked(problem: testing.AttentionProblem) -> testing.AttentionProblem:
    """What is compared with float64: the problem, or less of it where its exact scores would take gigabytes."""

    def too_many(p: testing.AttentionProblem) -> float:
        return p.B * p.Hq * p.Lq * p.Lk / _MOST_SCORES_CHECKED

    p = problem
    if too_many(p) > 1:
        p = replace(p, B=1)
    if too_many(p) > 1:
        p = replace(p, Hq=p.Hq // p.Hk, Hk=1)
    if too_many(p) > 1:
        p = replace(p, Lq=math.ceil(p.Lq / too_many(p) ** 0.5))
        p = replace(p, Lk=max(1, int(p.Lk / max(1.0, too_many(p)))))
    return p


def measure(problem: testing.AttentionProblem, budget: float, training: bool) -> dict[str, Any]:
    """One problem, after its numbers have been checked; not timed if they are wrong.

    ``times`` of the result is against the fastest of torch's backends, named as ``peer``; ``peers`` holds them all and
    ``left_out`` why one is not among them.
    """
    p = problem
    record: dict[str, Any] = {"B": p.B, "Hq": p.Hq, "Hk": p.Hk, "Lq": p.Lq, "Lk": p.Lk, "D": p.D}
    record |= {"dtype": str(p.dtype).removeprefix("torch."), "broken": [], "times": {}, "latency_s": {}}
    record |= {"peers": {}, "left_out": {}}
    record["broken"] = testing.failures(testing.attention_parity(checked(p)))
    if record["broken"]:
        return record
    torch.manual_seed(p.seed)
    like = torch.empty(0, dtype=p.dtype, device=p.device)
    shapes = (p.B, p.Hq, p.Lq, p.D), (p.B, p.Hk, p.Lk, p.D), (p.B, p.Hk, p.Lk, p.D)
    inputs = [torch.randn(shape).to(like) for shape in shapes]
    with torch.inference_mode():
        time_peers(record, "forward", p, inputs, budget)
    if training:
        time_peers(record, "forward + backward", p, [t.requires_grad_() for t in inputs], budget)
    return record


def time_peers(
    record: dict[str, Any], mode: str, problem: testing.AttentionProblem, inputs: list[Tensor], budget: float
) -> None:
    """fastgru against every backend of torch that takes the problem."""
    options: dict[str, Any] = {"is_causal": problem.causal, "enable_gqa": problem.Hq != problem.Hk}
    upstream = torch.randn_like(inputs[0], requires_grad=False)

    def call(attention: Callable[..., Tensor]) -> Callable[[], object]:
        if mode == "forward":
            return lambda: attention(*inputs, **options)
        return lambda: torch.autograd.grad(attention(*inputs, **options), inputs, upstream)

    calls = call(F.scaled_dot_product_attention), call(fastgru.scaled_dot_product_attention)
    device = inputs[0].device
    found = record["peers"][mode] = {}
    for name, (backend, devices) in PEERS.items():
        if device.type not in devices:
            continue
        reason = why_not(name, problem)
        with sdpa_kernel(backend), warnings.catch_warnings():
            # torch says in warnings why a backend does not take a problem.
            warnings.simplefilter("ignore")
            try:
                if reason is None:
                    calls[0]()
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                reason = "torch has no such kernel for these tensors"
            if reason is not None:
                record["left_out"][name] = reason
                continue
            found[name] = time_pair(*calls, device=device, seconds=budget).summary()
    if found:
        peer = min(found, key=lambda name: found[name]["baseline_s"])
        record["times"][mode] = {**found[peer], "peer": peer}
        with sdpa_kernel(PEERS[peer][0]):
            time_single_calls(record, mode, calls, device, budget)


def why_not(peer: str, problem: testing.AttentionProblem) -> str | None:
    """None, or why a backend of torch is not even tried."""
    needed = problem.B * problem.Hq * problem.Lq * problem.Lk * max(4, problem.dtype.itemsize)
    if peer == "math" and needed > _MOST_BYTES_OF_SCORES:
        return f"its scores would take {needed / 2**30:.0f} GiB"
    return None


def describe(args: argparse.Namespace) -> str:
    return "causal" if args.causal else "not causal"


ATTENTION = Family(
    baseline="torch's scaled_dot_product_attention",
    short="torch",
    sizes=("B", "Hq", "Hk", "Lq", "Lk", "D"),
    settings=("causal",),
    defaults={
        "heads": [8],
        "kv_heads": None,
        "seq": [512],
        "keys": None,
        "dim": [64],
        "batch": [1, 8],
        "causal": False,
        "training": False,
    },
    problems=problems,
    measure=measure,
    describe=describe,
)
