"""The shapes that the benchmarks measure."""

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


class Attention(NamedTuple):
    """Sizes of an attention problem: heads of queries and of keys, lengths, columns; and what hides keys."""

    B: int
    H: int
    Hk: int
    Lq: int
    Lk: int
    D: int
    causal: bool = False
    mask: str = ""  # bool: "keys" [B, 1, 1, Lk] or "scores" [B, 1, Lq, Lk]

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        return self[:6]

    def flops(self, mode: str) -> float:
        """Two products forward, five more backward; of a causal problem those below the diagonal."""
        seen = self.Lq * self.Lk
        if self.causal:
            seen = sum(min(i + 1, self.Lk) for i in range(self.Lq))
        return (4.0 if mode == "forward" else 14.0) * self.B * self.H * seen * self.D

    def bytes(self, size: int) -> float:
        """Of query, key, value and output, once each."""
        return 2.0 * size * self.B * self.D * (self.H * self.Lq + self.Hk * self.Lk)


#: Problem, mode and, by dtype, how many times as fast as the better of torch's backends it is meant to be, if a goal is
#: set: long and short self-attention and a decoding step; then those without a goal but to be no slower.
CPU_ATTENTION: list[tuple[Attention, str, dict[str, float | None]]] = [
    (Attention(1, 8, 8, 2048, 2048, 64), "forward", {"float32": 1.6, "bfloat16": 2.5}),
    (Attention(1, 8, 8, 2048, 2048, 128), "forward", {"float32": 1.6, "bfloat16": 2.5}),
    (Attention(8, 8, 8, 128, 128, 64), "training", {"float32": 1.5, "bfloat16": 1.5}),
    (Attention(32, 8, 8, 1, 128, 64), "forward", {"float32": 2.0, "bfloat16": 2.0}),
    (Attention(8, 8, 8, 128, 128, 64), "forward", {"float32": None, "bfloat16": None}),
    (Attention(1, 8, 8, 2048, 2048, 64, True), "forward", {"float32": None, "bfloat16": None}),
    (Attention(1, 8, 8, 1024, 1024, 64), "training", {"float32": None, "bfloat16": None}),
    (Attention(32, 32, 8, 1, 512, 128), "forward", {"float32": None, "bfloat16": None}),
]
