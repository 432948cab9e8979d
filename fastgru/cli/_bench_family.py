"""Describes an operator family to ``python -m fastgru bench``: its options, problems and measurements."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastgru.cli._timing import latency, time_pair

Calls = tuple[Callable[[], object], Callable[[], object]]
#: What is timed, and its name in tables.
MODES = {"forward": "fwd", "forward + backward": "fwd+bwd"}


@dataclass(frozen=True)
class Family:
    """One operator family.

    Args:
        baseline: what fastgru is compared with, in a sentence; ``short``: in a column's title.
        sizes: the entries of a result that tell problems apart, beside the dtype.
        settings: the options that hold for all problems of a run, as the record names them.
        defaults: its options, and those it shares with other families, and what they are if not given.
        problems: every combination of the options.
        measure: one problem in so many seconds for each measurement; ``training`` with the backward pass, too.
        describe: the settings in words.
    """

    baseline: str
    short: str
    sizes: tuple[str, ...]
    settings: tuple[str, ...]
    defaults: dict[str, Any]
    problems: Callable[[argparse.Namespace], list[Any]]
    measure: Callable[[Any, float, bool], dict[str, Any]]
    describe: Callable[[argparse.Namespace], str]

    def label(self, result: dict[str, Any]) -> str:
        """The sizes of a result, as the first column shows them."""
        return ",".join(str(result[name]) for name in self.sizes)


def time_both(record: dict[str, Any], mode: str, calls: Calls, device: torch.device, budget: float) -> None:
    """The ratio of torch and fastgru, from alternating rounds, and then how long single calls of each take."""
    record["times"][mode] = time_pair(*calls, device=device, seconds=budget).summary()
    time_single_calls(record, mode, calls, device, budget)


def time_single_calls(record: dict[str, Any], mode: str, calls: Calls, device: torch.device, budget: float) -> None:
    """How long single calls of torch and of fastgru take."""
    record["latency_s"][mode] = {
        name: latency(call, device=device, seconds=budget / 4)
        for name, call in zip(("baseline", "candidate"), calls, strict=True)
    }
