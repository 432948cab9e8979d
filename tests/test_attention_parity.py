"""The numeric rule for attention, forward and every gradient, over problems in which all pairs of values occur.

The oracle is attention written out in torch operators: in float64 the reference, in another dtype PyTorch's own error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgru
from fastgru.testing import pairwise


@dataclass(frozen=True)
class Problem:
    """One attention problem; every option of fastgru.flash_attention but dropout."""

    B: int = 2
    Hq: int = 4
    Hk: int = 2
    Lq: int = 5
    Lk: int = 7
    D: int = 8
    Dv: int = 8
    causal: bool = False
    align: str = "bottom_right"
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""  # "", "H" or "BH"
    mask: tuple[int, ...] = ()  # which of [B, Hq, Lq, Lk] the mask has, e.g. (0, 3)
    float_mask: bool = False
    bias: tuple[int, ...] | None = None
    q_lengths: bool = False
    k_lengths: bool = False
    heads_last: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def options(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "causal_align": self.align,
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
            "enable_gqa": True,
        }

    def draw(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Differentiable tensors, others, and the gradient of the output; all in float64, rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        rounded = torch.float32 if self.dtype == torch.float64 else self.dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(rounded).double()

        def chance(p: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) < p

        full = (self.B, self.Hq, self.Lq, self.Lk)
        leaves = {
            "query": normal(self.B, self.Hq, self.Lq, self.D),
            "key": normal(self.B, self.Hk, self.Lk, self.D),
            "value": normal(self.B, self.Hk, self.Lk, self.Dv),
        }
        others: dict[str, Tensor] = {}
        if self.mask:
            shape = [size if d in self.mask else 1 for d, size in enumerate(full)]
            if self.float_mask:
                leaves["attn_mask"] = normal(*shape)
            else:
                others["attn_mask"] = chance(0.7, *shape)
        if self.bias is not None:
            leaves["bias"] = normal(*[size if d in self.bias else 1 for d, size in enumerate(full)])
        if self.alibi:
            shape = [self.Hq] if self.alibi == "H" else [self.B, self.Hq]
            others["alibi_slopes"] = torch.rand(shape, generator=generator)
        if self.q_lengths:
            others["q_lengths"] = torch.randint(0, self.Lq + 1, (self.B,), generator=generator)
        if self.k_lengths:
            others["k_lengths"] = torch.randint(0, self.Lk + 1, (self.B,), generator=generator)
        return leaves, others, normal(self.B, self.Hq, self.Lq, self.Dv)


def plain(problem: Problem, leaves: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and lse in the leaves' dtype, every intermediate result in that dtype too."""
    p = problem
    query, group = leaves["query"], p.Hq // p.Hk
    key, value = (leaves[name].repeat_interleave(group, 1) for name in ("key", "value"))
    scores = query @ key.mT * (1 / math.sqrt(p.D) if p.scale is None else p.scale)
    if p.softcap:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    q_lengths = others.get("q_lengths", torch.full((p.B,), p.Lq)).view(-1, 1, 1, 1)
    k_lengths = others.get("k_lengths", torch.full((p.B,), p.Lk)).view(-1, 1, 1, 1)
    i, j = torch.arange(p.Lq).view(-1, 1), torch.arange(p.Lk)
    diagonal = i + (k_lengths - q_lengths if p.align == "bottom_right" else 0)
    if "alibi_slopes" in others:
        slopes = others["alibi_slopes"].view(-1, p.Hq, 1, 1).to(scores)
        scores = scores - slopes * (diagonal - j).abs()
    for name in ("bias", "attn_mask"):
        if name in leaves:
            scores = scores + leaves[name]
    visible = (i < q_lengths) & (j < k_lengths)
    left, right = p.window[0], 0 if p.causal else p.window[1]
    if left >= 0:
        visible = visible & (j >= diagonal - left)
    if right >= 0:
        visible = visible & (j <= diagonal + right)
    if "attn_mask" in others:
        visible = visible & others["attn_mask"]
    visible = visible.expand(scores.shape)
    empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(empty, 0)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    return weights @ value, scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)


def results(problem: Problem, ours: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, lse and every gradient, in float64."""
    leaves, others, grad = problem.draw()
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    if ours:
        fed = dict(leaves)
        if problem.heads_last:
            for name in ("query", "key", "value"):
                fed[name] = leaves[name].transpose(1, 2).contiguous().transpose(1, 2)
        output, lse = fastgru.flash_attention(**fed, **others, **problem.options(), return_lse=True)
    else:
        output, lse = plain(problem, leaves, others)
    # A gradient through lse too, where it is finite.
    loss = (output * grad.to(dtype)).sum() + lse.masked_fill(lse.isinf(), 0).sin().sum().to(dtype)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {"output": output, "lse": lse, **{f"grad of {n}": g for n, g in zip(leaves, grads, strict=True)}}
    return {name: t.detach().double() for name, t in named.items()}


def broken(problem: Problem) -> list[str]:
    """What breaks the numeric rule: error <= 2 x PyTorch's in the same dtype, 3 x for gradients, plus a floor.

    The floor of a gradient is 4 eps of the largest do . v: gradients of the scores are differences of such numbers, and
    vanish where one key has all the weight. (torch's CPU flash kernel too then returns about 5e-7 in place of 0.)
    """
    rounded = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    eps = torch.finfo(problem.dtype).eps
    draws = [replace(problem, seed=problem.seed + 100 * n) for n in range(3)]
    runs = [(results(p, True, p.dtype), results(p, False, rounded), results(p, False, torch.float64)) for p in draws]
    found = []
    for name in runs[0][2]:
        error = torch_error = largest = 0.0
        for p, (ours, theirs, reference) in zip(draws, runs, strict=True):
            want = reference[name]
            empty = want.isinf()
            assert ours[name].shape == want.shape, name
            if not torch.equal(ours[name].isinf(), empty) or ours[name].isnan().any():
                found.append(f"{name}: NaN or a wrong infinity")
                continue
            if want.numel() == 0:
                continue
            error = max(error, (ours[name] - want).masked_fill(empty, 0).abs().max().item())
            torch_error = max(torch_error, (theirs[name] - want).masked_fill(empty, 0).abs().max().item())
            largest = max(largest, want.masked_fill(empty, 0).abs().max().item())
            if name.startswith("grad"):
                leaves, _, grad = p.draw()
                products = grad.unflatten(1, (p.Hk, -1)) @ leaves["value"].mT.unsqueeze(2)
                if products.numel():
                    largest = max(largest, products.abs().max().item())
        multiple = 3 if name.startswith("grad") else 2
        if problem.dtype == torch.float64:
            torch_error *= eps / torch.finfo(torch.float32).eps
            multiple += 1
        limit = multiple * torch_error + 4 * eps * largest
        if not error <= limit:
            found.append(f"{name}: error {error:.3g}, limit {limit:.3g}, torch {torch_error:.3g}")
    return found


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FACTORS: dict[str, list[Any]] = {
    "Lq": [1, 3, 5, 66],
    "Lk": [1, 7, 101],
    "D": [1, 8, 33],
    "Dv": [3, 20],
    "B": [1, 3],
    "Hk": [1, 2],
    "causal": [False, True],
    "align": ["bottom_right", "top_left"],
    "window": [(-1, -1), (3, 0), (-1, 4), (2, 2)],
    "softcap": [0.0, 2.0],
    "alibi": ["", "H", "BH"],
    "mask": [(), (0, 3), (2, 3), (0, 1, 2, 3), (0, 1, 2)],
    "float_mask": [False, True],
    "bias": [None, (0, 1, 2, 3), (1, 2, 3), (3,), (2,)],
    "q_lengths": [False, True],
    "k_lengths": [False, True],
    "heads_last": [False, True],
    "scale": [None, 0.7],
    "dtype": DTYPES,
}
SELECTION = [Problem(**case, seed=seed) for seed, case in enumerate(pairwise(FACTORS))]
LARGER = [
    Problem(Lq=130, Lk=401, D=64, Dv=64, causal=True),
    Problem(Lq=201, Lk=70, D=40, Dv=72, causal=True, heads_last=True, dtype=torch.bfloat16),
    Problem(Lq=70, Lk=500, D=128, Dv=128, window=(100, 20), alibi="BH", k_lengths=True, dtype=torch.bfloat16),
    Problem(Lq=130, Lk=300, D=33, Dv=17, Hq=6, Hk=1, softcap=3.0, bias=(1, 2, 3), dtype=torch.float16),
    Problem(Lq=1, Lk=600, Hq=8, Hk=2, D=64, Dv=64, k_lengths=True),
    Problem(Lq=4, Lk=130, D=256, Dv=256, dtype=torch.bfloat16),
    Problem(Lq=0, Lk=3),
    Problem(Lq=6, Lk=0),
    Problem(Lq=2, Lk=0),
    Problem(B=0),
]


def features(p: Problem) -> list[pytest.MarkDecorator]:
    """The lines of docs/attention-features.md that a problem speaks for."""
    names = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
    how = "" if not p.mask else "float mask, gradient" if p.float_mask else "bool mask"
    if p.bias is not None:
        how = "bias, gradient"
    said: dict[str, str | bool] = {
        "backward": True,
        "dtypes": names[p.dtype],
        "head dim": str(p.D),
        "D ≠ Dv": p.Dv != p.D,
        "causal, Lq ≠ Lk": p.causal and p.Lq != p.Lk and p.align.replace("_", "-"),
        "GQA/MQA": p.Hq > p.Hk and ("GQA" if p.Hk > 1 else "MQA"),
        "sliding window": p.window != (-1, -1),
        "softcap": p.softcap > 0,
        "ALiBi": bool(p.alibi),
        "additive bias / mask": how,
        "key padding": p.k_lengths and "lengths",
        "varlen/nested": p.q_lengths and p.k_lengths and "lengths",
        "LSE": "gradient",
        "paged KV / decode": p.Lq == 1 and "decode",
        "CPU": True,
    }
    marks = [(name, "" if value is True else value) for name, value in said.items() if value]
    return [pytest.mark.feature("Attention", *mark) for mark in marks] if p.B and p.Lq and p.Lk else []


@pytest.mark.parametrize(
    "problem",
    [pytest.param(p, marks=features(p), id=f"{p.seed}-{p.Lq}x{p.Lk}-{p.dtype}") for p in SELECTION + LARGER],
)
def test_outputs_and_gradients(engine: str, problem: Problem) -> None:
    assert not broken(problem), problem


@pytest.mark.parametrize("wrong", [{"scale": 0.71}, {"causal": True}, {"softcap": 30.0}, {"window": (50, 2)}], ids=str)
def test_the_rule_sees_a_wrong_option(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    right = fastgru.flash_attention
    monkeypatch.setattr(fastgru, "flash_attention", lambda *args, **kwargs: right(*args, **{**kwargs, **wrong}))
    assert broken(Problem(Lq=9, Lk=70, scale=0.7))
