"""Attention problems, and the rule applied to them: output, lse and every gradient.

The oracle is attention written out in torch operators: in float64 the reference, in another dtype torch's own error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgru
from fastgru.testing.rule import MULTIPLE, Comparison, compare, failures

# Gradients of scores are products of more rounded numbers than an output.
_GRADIENT_MULTIPLE = 3.0
# Draws that a problem gets, unless it has as many scores as make luck unlikely.
_DRAWS = 3
_MANY_SCORES = 1 << 20
# A row that sees only keys of a mask of this size has an lse of this size.
_HUGE = 1e30

_Inputs = dict[str, Tensor]
_Attention = Callable[["AttentionProblem", _Inputs, _Inputs], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AttentionProblem:
    """One attention problem; every option of fastgru.flash_attention but dropout.

    Args:
        mask: which of [B, Hq, Lq, Lk] the mask has, such as (0, 3); none without any.
        float_mask: it is added to the scores and gets a gradient.
        lowest_mask: it is added to the scores and holds 0 and the dtype's lowest number; in float32, float64 and
            bfloat16 for whole rows, too.
        bias: which of [B, Hq, Lq, Lk] the bias has.
        alibi: "", "H" or "BH".
        heads_last: query, key and value are views of [B, L, H, D].
        sdpa: call fastgru.scaled_dot_product_attention, which has causal, top_left, mask and scale, and no lse.
    """

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
    alibi: str = ""
    mask: tuple[int, ...] = ()
    float_mask: bool = False
    lowest_mask: bool = False
    bias: tuple[int, ...] | None = None
    q_lengths: bool = False
    k_lengths: bool = False
    heads_last: bool = False
    scale: float | None = None
    sdpa: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"B{self.B}-H{self.Hq}/{self.Hk}-L{self.Lq}/{self.Lk}-D{self.D}/{self.Dv}"
        names = ("causal", "softcap", "alibi", "mask", "float_mask", "lowest_mask", "bias", "q_lengths", "k_lengths")
        flags = [name for name in (*names, "heads_last", "sdpa") if getattr(self, name)]
        if self.window != (-1, -1):
            flags.append("window")
        return "-".join([sizes, *flags, str(self.dtype).removeprefix("torch.")])

    @property
    def rounded(self) -> torch.dtype:
        """What torch's own error is measured in, and the numbers are exact in."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def draw(self) -> tuple[_Inputs, _Inputs, Tensor]:
        """Differentiable tensors, others, and the gradient of the output; in float64, rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return drawn.to(self.rounded).double().to(self.device)

        def chance(p: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) < p

        full = (self.B, self.Hq, self.Lq, self.Lk)
        leaves = {
            "query": normal(self.B, self.Hq, self.Lq, self.D),
            "key": normal(self.B, self.Hk, self.Lk, self.D),
            "value": normal(self.B, self.Hk, self.Lk, self.Dv),
        }
        others: _Inputs = {}
        if self.mask:
            shape = [size if d in self.mask else 1 for d, size in enumerate(full)]
            if self.lowest_mask:
                leaves["attn_mask"] = self._lowest(chance(0.5, *shape), chance(0.2, *shape[:3], 1)).to(self.device)
            elif self.float_mask:
                leaves["attn_mask"] = normal(*shape)
            else:
                others["attn_mask"] = chance(0.7, *shape).to(self.device)
        if self.bias is not None:
            leaves["bias"] = normal(*[size if d in self.bias else 1 for d, size in enumerate(full)])
        if self.alibi:
            slopes = torch.rand([self.Hq] if self.alibi == "H" else [self.B, self.Hq], generator=generator)
            others["alibi_slopes"] = slopes.to(self.device)
        for name, given, length in (("q_lengths", self.q_lengths, self.Lq), ("k_lengths", self.k_lengths, self.Lk)):
            if given:
                others[name] = torch.randint(0, length + 1, (self.B,), generator=generator).to(self.device)
        return leaves, others, normal(self.B, self.Hq, self.Lq, self.Dv)

    def _lowest(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """A mask of 0 and the lowest number: where ``hidden``, and all along ``rows``."""
        info = torch.finfo(self.rounded)
        if info.max < _HUGE:
            # A score added to the lowest number of float16 is one that float16 lacks: the first key is always seen.
            hidden[..., :1] = False
        else:
            hidden = hidden | rows
        return torch.where(hidden, info.min, 0.0).double()


def attention_parity(problem: AttentionProblem) -> list[Comparison]:
    """Output, lse and every gradient of fastgru's attention, on the backend in use, under the rule.

    Gradients may have three times torch's error. Their floor is in parts of the largest do . v too: gradients of the
    scores are differences of such numbers, and vanish where one key has all the weight. (torch's CPU flash kernel too
    then returns about 5e-7 in place of 0.)
    """
    scores = problem.B * problem.Hq * problem.Lq * problem.Lk
    count = 1 if scores > _MANY_SCORES else _DRAWS
    problems = [replace(problem, seed=problem.seed + 100 * n) for n in range(count)]
    oracles = [_oracle(p) for p in problems]
    ours = [_run(p, _ours, p.dtype) for p in problems]
    terms = max(oracle.terms for oracle in oracles)
    found = []
    for name in ours[0]:
        tensors = [(run[name], one.theirs[name], one.reference[name]) for run, one in zip(ours, oracles, strict=True)]
        gradient = name.startswith("grad")
        multiple, magnitude = (_GRADIENT_MULTIPLE, terms) if gradient else (MULTIPLE, 0.0)
        found.append(compare(name, tensors, problem.dtype, multiple=multiple, magnitude=magnitude))
    return found


def assert_attention_parity(problem: AttentionProblem) -> None:
    """Raises AssertionError that lists every tensor of :func:`attention_parity` which breaks the rule."""
    broken = failures(attention_parity(problem))
    if broken:
        raise AssertionError(f"{problem}:\n  " + "\n  ".join(broken))


class _Oracle(NamedTuple):
    """What a draw is compared with; ``terms`` is the largest do . v of a query and a key."""

    theirs: dict[str, Tensor]
    reference: dict[str, Tensor]
    terms: float


# Kept for the next backend or instruction set.
@functools.lru_cache(128)
def _oracle(problem: AttentionProblem) -> _Oracle:
    leaves, _, grad = problem.draw()
    products = grad.unflatten(1, (problem.Hk, -1)) @ leaves["value"].mT.unsqueeze(2)
    terms = products.abs().max().item() if products.numel() else 0.0
    theirs, reference = (_run(problem, written_out, dtype) for dtype in (problem.rounded, torch.float64))
    return _Oracle(theirs, reference, terms)


def written_out(problem: AttentionProblem, leaves: _Inputs, others: _Inputs) -> tuple[Tensor, Tensor]:
    """Output and lse in the leaves' dtype, every intermediate result in that dtype too."""
    p = problem
    query, group, device = leaves["query"], p.Hq // p.Hk, p.device
    key, value = (leaves[name].repeat_interleave(group, 1) for name in ("key", "value"))
    scores = query @ key.mT * (1 / math.sqrt(p.D) if p.scale is None else p.scale)
    if p.softcap:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    q_lengths = others.get("q_lengths", torch.full((p.B,), p.Lq, device=device)).view(-1, 1, 1, 1)
    k_lengths = others.get("k_lengths", torch.full((p.B,), p.Lk, device=device)).view(-1, 1, 1, 1)
    i, j = torch.arange(p.Lq, device=device).view(-1, 1), torch.arange(p.Lk, device=device)
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


def _ours(problem: AttentionProblem, leaves: _Inputs, others: _Inputs) -> tuple[Tensor, Tensor]:
    """Output and lse of fastgru, on the backend in use."""
    p, fed = problem, dict[str, Any](leaves | others)
    if p.heads_last:
        for name in ("query", "key", "value"):
            fed[name] = leaves[name].transpose(1, 2).contiguous().transpose(1, 2)
    if p.sdpa:
        output = fastgru.scaled_dot_product_attention(**fed, is_causal=p.causal, scale=p.scale, enable_gqa=p.Hq != p.Hk)
        return output, output.new_zeros(output.shape[:3])
    fed |= {"causal": p.causal, "causal_align": p.align, "window": p.window}
    fed |= {"softcap": p.softcap, "scale": p.scale, "enable_gqa": True}
    return fastgru.flash_attention(**fed, return_lse=True)


def _run(problem: AttentionProblem, attention: _Attention, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, lse and every gradient, in float64."""
    leaves, others, grad = problem.draw()
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    output, lse = attention(problem, leaves, others)
    loss = (output * grad.to(dtype)).sum()
    named = {"output": output}
    if not problem.sdpa:
        # A gradient through lse too, where it is a finite number whose sine means something.
        loss = loss + lse.masked_fill(lse.abs() > _HUGE, 0).sin().sum().to(dtype)
        # Of rows of the mask's size in parts of it, so that the other rows are not compared in parts of that.
        named["lse"] = torch.where((lse.abs() > _HUGE) & lse.isfinite(), lse / torch.finfo(problem.rounded).min, lse)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named |= {f"grad of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: t.detach().double() for name, t in named.items()}
