"""Times fastgru.GRU and torch.nn.GRU."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastgru
from fastgru import testing
from fastgru.cli._bench_family import Family, time_both
from fastgru.cli._common import DTYPES


def problems(args: argparse.Namespace) -> list[testing.GruProblem]:
    """Every combination of the sizes."""
    return [
        testing.GruProblem(
            T=seq,
            B=batch,
            I=width,
            H=hidden,
            num_layers=args.layers,
            bidirectional=args.bidirectional,
            hx=False,
            dtype=DTYPES[dtype],
            device=str(args.device),
        )
        for dtype, seq, batch, width, hidden in itertools.product(
            args.dtype, args.seq, args.batch, args.input, args.hidden
        )
    ]


def measure(problem: testing.GruProblem, budget: float, training: bool) -> dict[str, Any]:
    """One problem, after its numbers have been checked; not timed if they are wrong."""
    sizes = {"T": problem.T, "B": problem.B, "I": problem.I, "H": problem.H}
    dtype = str(problem.dtype).removeprefix("torch.")
    record: dict[str, Any] = {**sizes, "dtype": dtype, "broken": [], "times": {}, "latency_s": {}}
    record["broken"] = testing.failures(testing.parity(problem))
    if record["broken"]:
        return record

    torch.manual_seed(problem.seed)
    shape = (problem.I, problem.H, problem.num_layers)
    options: dict[str, Any] = {
        "bidirectional": problem.bidirectional,
        "dtype": problem.dtype,
        "device": problem.device,
    }
    baseline, candidate = nn.GRU(*shape, **options), fastgru.GRU(*shape, **options)
    candidate.load_state_dict(baseline.state_dict())
    like = baseline.weight_hh_l0
    assert isinstance(like, Tensor)
    input = torch.randn(problem.T, problem.B, problem.I).to(like)
    with torch.inference_mode():
        calls = (lambda: baseline(input), lambda: candidate(input))
        time_both(record, "forward", calls, like.device, budget)
    if training:
        steps = (training_step(baseline, input), training_step(candidate, input))
        time_both(record, "forward + backward", steps, like.device, budget)
    return record


def training_step(module: nn.RNNBase, input: Tensor) -> Callable[[], object]:
    """A callable that computes the gradients of input, initial state and all weights."""
    directions = 2 if module.bidirectional else 1
    x = input.clone().requires_grad_()
    hx = input.new_zeros(module.num_layers * directions, input.size(1), module.hidden_size, requires_grad=True)
    sources = [x, hx, *module.parameters()]
    upstream = (
        torch.randn(*input.shape[:2], directions * module.hidden_size).to(input),
        torch.randn(hx.shape).to(input),
    )
    return lambda: torch.autograd.grad(module(x, hx), sources, upstream)


def describe(args: argparse.Namespace) -> str:
    return f"{args.layers} layer(s){', bidirectional' if args.bidirectional else ''}"


GRU = Family(
    baseline="torch.nn.GRU",
    short="nn.GRU",
    sizes=("T", "B", "I", "H"),
    settings=("layers", "bidirectional"),
    defaults={
        "hidden": [128, 256],
        "input": [128],
        "batch": [1, 8],
        "seq": [64],
        "layers": 1,
        "bidirectional": False,
        "training": True,
    },
    problems=problems,
    measure=measure,
    describe=describe,
)
