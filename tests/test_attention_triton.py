"""The Triton attention kernels against the reference backend, on the CPU in Triton's interpreter.

Triton decides between interpreter and compiler when it is imported, so the interpreted tests run in a process of their
own, which the first test starts. (The interpreter does not multiply bfloat16; float16 takes the same way.)
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_triton_compiles import disassemble
from torch import Tensor

from fastgru.backends import reference_attention, triton_attention
from fastgru.backends.reference_attention import Attention
from fastgru.ops.attention_schema import ATTENTION_OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("part", ["float32", "float16", "hidden or empty"])
def test_in_the_interpreter(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", part]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


SIZES = {"B": 2, "Hq": 4, "Hk": 2, "Lq": 37, "Lk": 70, "D": 8, "Dv": 20}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one query": {"Lq": 1},
    "one query, split keys": {"B": 1, "Lq": 1, "Lk": 300, "Hq": 2},
    "few queries, split keys": {
        "Lq": 3,
        "Lk": 400,
        "Hq": 2,
        "heads_last": True,
        "k_lengths": [0, 300],
        "window_right": 2,
        "window_left": 200,
        "softcap": 2.0,
        "dropout_p": 0.3,
    },
    "odd columns": {"D": 33, "Dv": 3, "Hq": 3, "Hk": 1},
    "causal, more keys": {"window_right": 0},
    "causal, more queries": {"window_right": 0, "Lq": 70, "Lk": 37},
    "causal, top left": {"window_right": 0, "bottom_right": False},
    "window": {"window_left": 9, "window_right": 3},
    "softcap, ALiBi": {"softcap": 2.0, "alibi": True},
    "mask": {"mask": (2, 1, 37, 70)},
    "padding mask": {"mask": (2, 1, 1, 70)},
    "bias": {"bias": (2, 4, 37, 70)},
    "bias of heads": {"bias": (1, 4, 37, 70), "softcap": 1.0},
    "bias of keys": {"bias": (1, 1, 1, 70), "heads_last": True},
    "lengths": {"q_lengths": [37, 3], "k_lengths": [0, 50], "window_right": 0},
    "dropout": {"dropout_p": 0.4},
    "all": {
        "q_lengths": [30, 37],
        "k_lengths": [70, 61],
        "window_left": 40,
        "window_right": 5,
        "softcap": 3.0,
        "alibi": True,
        "mask": (2, 4, 37, 1),
        "bias": (1, 1, 37, 70),
        "dropout_p": 0.2,
    },
}


def problem(case: dict[str, Any], dtype: torch.dtype) -> Attention:
    sizes = {name: case.get(name, size) for name, size in SIZES.items()}
    B, Hq, Hk, Lq, Lk, D, Dv = sizes.values()

    def draw(heads: int, length: int, columns: int) -> Tensor:
        if case.get("heads_last"):
            return torch.randn(B, length, heads, columns).to(dtype).transpose(1, 2)
        return torch.randn(B, heads, length, columns).to(dtype)

    def lengths(name: str) -> Tensor | None:
        return torch.tensor(case[name]) if name in case else None

    return Attention(
        draw(Hq, Lq, D),
        draw(Hk, Lk, D),
        draw(Hk, Lk, Dv),
        torch.randn(case["bias"]).to(dtype) if "bias" in case else None,
        torch.rand(case["mask"]) < 0.7 if "mask" in case else None,
        lengths("q_lengths"),
        lengths("k_lengths"),
        torch.rand(B, Hq) if case.get("alibi") else None,
        torch.tensor(-12345678901234) if "dropout_p" in case else None,
        case.get("dropout_p", 0.0),
        0.6,
        case.get("softcap", 0.0),
        case.get("window_left", -1),
        case.get("window_right", -1),
        case.get("bottom_right", True),
    )


def run(backend: Any, a: Attention, seeds: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output, lse and the gradients, in float64."""
    a = Attention(*(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in a))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if a.alibi_slopes is not None:
        a = a._replace(alibi_slopes=a.alibi_slopes.to(wide))
    output, lse = backend.attention(*a)
    grads = backend.attention_backward(seeds[0].to(dtype), seeds[1].to(wide), *a, output, lse, a.bias is not None)
    return [t.double() for t in (output, lse, *grads)]


HALF = ("plain", "few queries, split keys", "causal, more keys", "bias of heads", "dropout", "all")


@interpreted
@pytest.mark.parametrize(
    "name, dtype", [*((name, torch.float32) for name in CASES), *((name, torch.float16) for name in HALF)], ids=str
)
def test_like_the_reference(name: str, dtype: torch.dtype) -> None:
    a = problem(CASES[name], dtype)
    output_shape = (*a.query.shape[:3], a.value.shape[3])
    seeds = torch.randn(output_shape).to(dtype), torch.randn(output_shape[:3])
    exact = run(reference_attention, a, seeds, torch.float64)
    plain = run(reference_attention, a, seeds, dtype)
    ours = run(triton_attention, a, seeds, dtype)
    products = (seeds[0].double().unflatten(1, (a.key.shape[1], -1)) @ a.value.double().mT.unsqueeze(2)).abs().max()
    for index, (want, theirs, got) in enumerate(zip(exact, plain, ours, strict=True)):
        assert torch.equal(got.isinf(), want.isinf()) and not got.isnan().any()
        if want.numel() == 0:
            continue
        hidden = want.isinf()
        error, their_error = ((t - want).masked_fill(hidden, 0).abs().max() for t in (got, theirs))
        largest = torch.maximum(want.masked_fill(hidden, 0).abs().max(), products if index > 1 else torch.tensor(0.0))
        # float16: the reference keeps the weights in float32, a tensor core takes them in float16.
        multiple = 3 if dtype == torch.float32 else 8
        assert error <= multiple * their_error + 4 * torch.finfo(dtype).eps * largest, (index, error, their_error)


@interpreted
def test_keys_are_split_for_few_queries_only() -> None:
    for sizes, want in (
        ({"B": 1, "Hq": 2, "Lq": 1, "Lk": 300}, 2),
        ({"Lq": 1, "Lk": 70}, 1),
        ({"Lq": 1, "Lk": 10**4}, 32),
    ):
        sizes = {**SIZES, **sizes}
        sizes["Hk"] = sizes["Hq"]
        launch = triton_attention._Launch(problem(sizes, torch.float32))
        assert triton_attention._splits(launch) == want
    many = triton_attention._Launch(problem({"B": 8, "Lq": 600, "Lk": 600}, torch.float32))
    assert triton_attention._splits(many) == 1


@interpreted
def test_hidden_nan() -> None:
    a = problem({"k_lengths": [60, 60]}, torch.float32)
    seeds = torch.randn(2, 4, 37, 20), torch.randn(2, 4, 37)
    want = run(triton_attention, a, seeds, torch.float32)
    for t in (a.key, a.value):
        t[:, :, 60:] = torch.nan
    for one, other in zip(want, run(triton_attention, a, seeds, torch.float32), strict=True):
        assert torch.equal(one, other)
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
    mask[..., 50:] = False
    a = a._replace(mask=mask)
    a.value[:, :, 50:] = torch.nan
    assert not any(t.isnan().any() for t in run(triton_attention, a, seeds, torch.float32))


@interpreted
def test_empty() -> None:
    for sizes in ({"Lk": 0}, {"Lq": 0}, {"B": 0}):
        a = problem(sizes, torch.float32)
        seeds = torch.randn(*a.query.shape[:3], 20), torch.randn(a.query.shape[:3])
        ours, want = (run(backend, a, seeds, torch.float32) for backend in (triton_attention, reference_attention))
        for one, other in zip(ours, want, strict=True):
            assert torch.equal(one, other)


@interpreted
def test_empty_bias_gradient_and_operator() -> None:
    a = problem({"bias": (1, 4, 37, 1), "Lk": 0}, torch.float32)
    leaves = [t.requires_grad_() for t in a[:4] if t is not None]
    for backend in ("reference", "triton"):
        output, lse = ATTENTION_OPS[backend].forward(*a)
        assert (lse == -torch.inf).all() and not any(t.any() for t in torch.autograd.grad(output.sum(), leaves))
    a = problem({"bias": (1, 4, 1, 70), "dropout_p": 0.1, "window_right": 0}, torch.float32)
    leaves = [t.requires_grad_() for t in a[:4] if t is not None]
    grads = [
        torch.autograd.grad(ATTENTION_OPS[backend].forward(*a)[0].sin().sum(), leaves)
        for backend in ("reference", "triton")
    ]
    torch.testing.assert_close(*grads)


FLOATS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "bias")
POINTERS = {name: "*fp32" for name in ("lse", "delta", "d_bias", "slopes")}
POINTERS |= {"mask": "*i8", "seed": "*i64", "q_lengths": "*i64", "k_lengths": "*i64"}
NUMBERS = {"scale": "fp32", "softcap": "fp32", "keep_scale": "fp32", "drop_below": "i64"}
# What is compiled in. Less takes more registers now and then: Triton then does more of the loop's work before it.
FEATURES: dict[str, tuple[str, ...] | None] = {
    "plain": (),
    "causal": ("BOTTOM_RIGHT", "RIGHT"),
    "windows and lengths": ("BOTTOM_RIGHT", "LEFT", "RIGHT", "HAS_Q", "HAS_K"),
    "all": None,
}
# Bytes of shared memory that one block may have, and the matrix instruction of a tile of 64 rows.
TARGETS = {80: (163 * 1024, "HMMA"), 90: (227 * 1024, "HGMMA"), 100: (227 * 1024, "UTCHMMA")}
COMPILED = [
    # compute capability, type, columns of a head, whether they are a multiple of 16, features
    (80, "bf16", 64, True, "windows and lengths"),
    (80, "bf16", 64, False, "causal"),
    (80, "fp16", 128, False, "all"),
    (90, "bf16", 64, True, "all"),
    (90, "bf16", 64, True, "causal"),
    (90, "bf16", 128, True, "windows and lengths"),
    (100, "bf16", 64, True, "windows and lengths"),
    (80, "bf16", 256, True, "all"),
    (90, "bf16", 256, True, "causal"),
    (100, "fp16", 256, False, "plain"),
    (80, "fp32", 64, True, "all"),
    (90, "fp32", 64, False, "causal"),
    (90, "fp32", 128, True, "all"),
    (100, "fp32", 128, True, "plain"),
    (80, "fp32", 256, True, "causal"),
    (90, "fp32", 256, True, "all"),
    (100, "fp32", 256, False, "windows and lengths"),
]


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability, dtype, columns, even, features", COMPILED)
@pytest.mark.parametrize("name", ["attention_forward", "attention_backward_queries", "attention_backward_keys"])
def test_compiles_without_a_gpu(
    name: str, capability: int, dtype: str, columns: int, even: bool, features: str, tmp_path: Path
) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_attention._module("attn_fwd" if name == "attention_forward" else "attn_bwd"), name)
    on = FEATURES[features]
    tiles = triton_attention.tiles(columns, "float32" if dtype == "fp32" else "heavy" if on is None else "light")
    field = {"attention_forward": "forward", "attention_backward_queries": "by_queries"}.get(name, "by_keys")
    tile = getattr(tiles, field)
    sizes = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "BLOCK_D": columns, "BLOCK_DV": columns}
    # Every other constant turns a feature on.
    names = kernel.arg_names
    constants: dict[str, Any] = {
        arg: sizes.get(arg, on is None or arg in on) for arg in names if arg.isupper() and arg != "PRECISION"
    }
    constants["PRECISION"] = "ieee"
    types = POINTERS | dict.fromkeys(FLOATS, f"*{dtype}") | NUMBERS | dict.fromkeys(constants, "constexpr")
    signature = {arg: types.get(arg, "i32") for arg in names}
    constexprs = {(names.index(arg),): value for arg, value in constants.items()}
    # What Triton finds to be a multiple of 16.
    rows = [arg for arg in names if arg[-2:] == "_l" and arg not in ("bias_l", "mask_l")]
    others = [arg for arg in names if arg[-2:] in ("_b", "_h", "_l") or arg in ("columns", "value_columns")]
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(names)
        if signature[arg][0] == "*" or arg in (others if even else rows)
    }
    source = ASTSource(kernel, signature, constexprs, aligned)
    options = {"num_stages": tile.stages, **triton_attention._OPTIONS}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    most, instruction = TARGETS[capability]
    assert compiled.metadata.shared <= most
    code = disassemble(compiled, tmp_path)
    assert not re.findall(r"\b(?:LDL|STL)\b.*", code)
    if dtype != "fp32":
        found = set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code))
        assert found and (instruction in found or tile.queries < 64), found
