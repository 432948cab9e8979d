"""The shapes that the benchmarks measure: (T, B, I, H)."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """Sizes of one GRU layer and its input."""

    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"

    @property
    def forward_flops(self) -> float:
        """Multiply-adds of the two products, counted as two operations each."""
        return 6.0 * self.T * self.B * self.H * (self.I + self.H)


#: From one streaming step to a training batch.
CPU_GRU = [
    Problem(1, 1, 128, 128),
    Problem(1, 1, 512, 512),
    Problem(32, 1, 128, 128),
    Problem(128, 1, 256, 256),
    Problem(128, 1, 512, 512),
    Problem(128, 1, 1024, 1024),
    Problem(128, 8, 256, 256),
    Problem(64, 32, 256, 256),
    Problem(64, 32, 512, 512),
    Problem(32, 32, 1024, 1024),
    Problem(64, 128, 512, 512),
]
