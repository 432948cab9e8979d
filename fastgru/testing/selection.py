"""Chooses few problems in which every pair of settings occurs."""

from __future__ import annotations

import itertools
import random
from typing import Any


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every pair of values of two factors occurs: greedy, from random candidates."""
    rng = random.Random(0)

    def pairs(case: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
        return set(itertools.combinations(case.items(), 2))

    missing = {((a, x), (b, y)) for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]}
    chosen = []
    while missing:
        (a, x), (b, y) = min(missing, key=str)
        candidates = [{name: rng.choice(values) for name, values in factors.items()} | {a: x, b: y} for _ in range(50)]
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen
