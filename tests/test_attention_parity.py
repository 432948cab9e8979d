"""The numeric rule for attention, forward and every gradient, over problems in which all pairs of values occur."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastgru
from fastgru.testing import AttentionProblem, assert_attention_parity, attention_parity, failures, pairwise

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
SELECTION = [AttentionProblem(**case, seed=seed) for seed, case in enumerate(pairwise(FACTORS))]
LARGER = [
    AttentionProblem(Lq=130, Lk=401, D=64, Dv=64, causal=True),
    AttentionProblem(Lq=201, Lk=70, D=40, Dv=72, causal=True, heads_last=True, dtype=torch.bfloat16),
    AttentionProblem(Lq=70, Lk=500, D=128, Dv=128, window=(100, 20), alibi="BH", k_lengths=True, dtype=torch.bfloat16),
    AttentionProblem(Lq=130, Lk=300, D=33, Dv=17, Hq=6, Hk=1, softcap=3.0, bias=(1, 2, 3), dtype=torch.float16),
    AttentionProblem(Lq=1, Lk=600, Hq=8, Hk=2, D=64, Dv=64, k_lengths=True),
    AttentionProblem(Lq=4, Lk=130, D=256, Dv=256, dtype=torch.bfloat16),
    AttentionProblem(Lq=0, Lk=3),
    AttentionProblem(Lq=6, Lk=0),
    AttentionProblem(Lq=2, Lk=0),
    AttentionProblem(B=0),
]


def features(p: AttentionProblem) -> list[pytest.MarkDecorator]:
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
def test_outputs_and_gradients(engine: str, problem: AttentionProblem) -> None:
    assert_attention_parity(problem)


@pytest.mark.parametrize("wrong", [{"scale": 0.71}, {"causal": True}, {"softcap": 30.0}, {"window": (50, 2)}], ids=str)
def test_the_rule_sees_a_wrong_option(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    right = fastgru.flash_attention
    monkeypatch.setattr(fastgru, "flash_attention", lambda *args, **kwargs: right(*args, **{**kwargs, **wrong}))
    assert failures(attention_parity(AttentionProblem(Lq=9, Lk=70, scale=0.7)))
