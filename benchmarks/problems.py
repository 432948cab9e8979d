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

    @property
    def training_flops(self) -> float:
        return 3 * self.forward_flops


class Attention(NamedTuple):
    """Sizes of the queries and of the keys and values: [B, H, Lq, D] and [B, H, Lk, D]."""

    B: int
    H: int
    Lq: int
    Lk: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B}-H{self.H}-Lq{self.Lq}-Lk{self.Lk}-D{self.D}"

    @property
    def forward_flops(self) -> float:
        """Multiply-adds of the two products, counted as two operations each."""
        return 4.0 * self.B * self.H * self.Lq * self.Lk * self.D

    @property
    def training_flops(self) -> float:
        """Five products more, one of which computes the scores again."""
        return 3.5 * self.forward_flops


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

#: Where nn.GRU runs cuDNN's large kernel, and where it runs one kernel per step.
CUDA_GRU = [Problem(256, B, H, H) for H in (128, 512, 1024) for B in (1, 32, 128)]

#: Long and short self-attention, and a decoding step.
CPU_ATTENTION = [Attention(1, 8, 1024, 1024, 64), Attention(8, 8, 128, 128, 64), Attention(32, 8, 1, 512, 64)]

CUDA_ATTENTION = [
    Attention(4, 16, 4096, 4096, 64),
    Attention(4, 16, 4096, 4096, 128),
    Attention(32, 16, 512, 512, 64),
    Attention(64, 16, 1, 4096, 128),
]


class GroupedAttention(NamedTuple):
    """Sizes of an attention problem with its own number of heads of keys, and what hides keys."""

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
CPU_ATTENTION_GOALS: list[tuple[GroupedAttention, str, dict[str, float | None]]] = [
    (GroupedAttention(1, 8, 8, 2048, 2048, 64), "forward", {"float32": 1.6, "bfloat16": 2.5}),
    (GroupedAttention(1, 8, 8, 2048, 2048, 128), "forward", {"float32": 1.6, "bfloat16": 2.5}),
    (GroupedAttention(8, 8, 8, 128, 128, 64), "training", {"float32": 1.5, "bfloat16": 1.5}),
    (GroupedAttention(32, 8, 8, 1, 128, 64), "forward", {"float32": 2.0, "bfloat16": 2.0}),
    (GroupedAttention(8, 8, 8, 128, 128, 64), "forward", {"float32": None, "bfloat16": None}),
    (GroupedAttention(1, 8, 8, 2048, 2048, 64, True), "forward", {"float32": None, "bfloat16": None}),
    (GroupedAttention(1, 8, 8, 1024, 1024, 64), "training", {"float32": None, "bfloat16": None}),
    (GroupedAttention(32, 32, 8, 1, 512, 128), "forward", {"float32": None, "bfloat16": None}),
]
