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

from fastgru import testing
from fastgru.ops.attention import reference as reference_attention
from fastgru.ops.attention import triton as triton_attention
from fastgru.ops.attention.arguments import Attention
from fastgru.ops.attention.schema import ATTENTION_OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("part", ["float32", "float16", "hidden or empty or large", "split"])
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
    output, lse, statistics = backend.attention(*a)
    seed, lse_seed = seeds[0].to(dtype), seeds[1].to(wide)
    grads = backend.attention_backward(seed, lse_seed, *a, output, statistics, a.bias is not None)
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
    # float16: the reference keeps the weights in float32, a tensor core takes them in float16.
    multiple = 3 if dtype == torch.float32 else 8
    for index, (want, theirs, got) in enumerate(zip(exact, plain, ours, strict=True)):
        # Gradients of scores are differences of the products.
        terms = products.item() if index > 1 else 0.0
        found = testing.compare(str(index), [(got, theirs, want)], dtype, multiple=multiple, magnitude=terms)
        assert found.ok, found


def rounded(a: Attention, d_output: Tensor, d_lse: Tensor) -> list[Tensor]:
    """Output, lse and gradients in float64 of scores as float32 has them, of one head with no more than large() has."""
    q, k, v = (t.double() for t in a[:3])
    capped = (q @ k.mT).float() * a.scale
    if a.softcap:
        capped = a.softcap * torch.tanh(capped / a.softcap)
    scores = capped if a.bias is None else capped + a.bias.float()
    if a.mask is not None:
        scores = scores.masked_fill(~a.mask, -torch.inf)
    p = scores.double().softmax(-1)
    dp = d_output.double() @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True) + d_lse.double().unsqueeze(-1))
    dx = ds * (1 - (capped.double() / a.softcap) ** 2) if a.softcap else ds
    grads = [dx @ k * a.scale, dx.mT @ q * a.scale, p.mT @ d_output.double()]
    if a.bias is not None:
        grads.append(ds.sum_to_size(a.bias.shape))
    return [p @ v, scores.double().logsumexp(-1), *grads]


def whole(low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers, of which float32 holds products and sums as they are."""
    return torch.randint(low, high + 1, shape).float()


def large(name: str, dtype: torch.dtype, queries: int) -> Attention:
    """Of one head: scores or masks near the ends of what a type holds."""
    keys = 300 if queries < 4 else 50
    nothing: list[Any] = [None] * 6
    a = Attention(
        *(torch.randn(1, 1, n, 16).to(dtype) for n in (queries, keys, keys)), *nothing, 0.0, 0.25, 0.0, -1, -1, True
    )
    if name == "finfo.min":
        return a._replace(bias=torch.full((1, 1, queries, keys), torch.finfo(dtype).min, dtype=dtype))
    if name == "finfo.max":
        return a._replace(bias=torch.full((1, 1, queries, keys), torch.finfo(dtype).max / 2, dtype=dtype))
    if name in ("-1e12", "-1e9"):
        return a._replace(bias=torch.full((1, 1, queries, keys), float(name)))
    if name == "-1e9 in part":
        bias = torch.zeros(1, 1, queries, keys)
        bias[..., 20:], bias[..., :1, :] = -1e9, -1e9
        return a._replace(bias=bias)
    if name == "equal":
        return a._replace(
            **{field: torch.full_like(t, 133120.0) for field, t in zip(a._fields[:3], a[:3], strict=True)}
        )
    # Scores of 3e4 to 5e4, and near their maximum some that count.
    size = 56 if dtype == torch.float32 else 50
    a = a._replace(
        query=(size + whole(0, 1, *a.query.shape)).to(dtype), key=(size + whole(0, 1, *a.key.shape)).to(dtype)
    )
    a = a._replace(scale=1.0 if name != "negative scale" else -1.0)
    a.key[:, :, ::3] -= 20
    if name == "mask":
        a = a._replace(mask=torch.rand(1, 1, queries, keys) < 0.5)
    if name == "bias":
        a = a._replace(bias=whole(-8, 8, 1, 1, queries, keys).to(dtype))
    if name == "softcap":
        a = a._replace(softcap=65536.0)
    return a


LARGE = (
    "finfo.min", "finfo.max", "-1e12", "-1e9", "-1e9 in part", "equal", "scores", "mask", "bias", "softcap",
    "negative scale",
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize(
    "name, dtype",
    [*((n, torch.float32) for n in LARGE), *((n, torch.float16) for n in ("finfo.min", "finfo.max", "scores", "bias"))],
    ids=str,
)
def test_large(name: str, dtype: torch.dtype, queries: int) -> None:
    """Weights sum to 1 whatever the scores are, forward and backward. The keys of one query are in several parts."""
    a = large(name, dtype, queries)
    d_output, d_lse = torch.randn(a.query.shape).to(dtype), torch.randn(a.query.shape[:3])
    found, want = run(triton_attention, a, (d_output, d_lse), dtype), rounded(a, d_output, d_lse)
    # tanh of large scores: the last bit of a score is a part in 256.
    tolerance = 0.02 if name == "softcap" else 2e-6 if dtype == torch.float32 else 2e-3
    # What gradients are differences of.
    terms = (d_output.double() @ a.value.double().mT).abs().max()
    for field, got, right in zip(("output", "lse", "query", "key", "value", "bias"), found, want, strict=False):
        other = {"query": a.key, "key": a.query}.get(field)
        largest = (
            max(right.abs().max(), terms * other.abs().max() * abs(a.scale)) if other is not None else right.abs().max()
        )
        assert (got - right).abs().max() <= tolerance * largest, field
    if dtype == torch.float32 and name in ("finfo.min", "-1e12", "-1e9", "equal"):
        output, lse = found[:2]
        seeds = torch.ones_like(d_output), torch.zeros_like(d_lse)
        _, _, d_query, _, d_value = run(triton_attention, a, seeds, dtype)[:5]
        torch.testing.assert_close(
            output, a.value.double().mean(2, keepdim=True).expand_as(output), rtol=2e-3, atol=2e-3
        )
        torch.testing.assert_close(d_value, torch.full_like(d_value, queries / a.key.shape[2]), rtol=1e-3, atol=0)
        assert d_query.isfinite().all() and lse.isfinite().all()


@interpreted
@pytest.mark.parametrize("case", [{}, {"bias": (1, 1, 37, 70)}, {"softcap": 2.0}, {"dropout_p": 0.4}])
def test_large_one_key(case: dict[str, Any]) -> None:
    """Which gets the gradients of a constant: none, but for that of lse."""
    a = problem({**case, "window_left": 0, "window_right": 0, "Lq": 37, "Lk": 70}, torch.float32)
    a = a._replace(query=100 * a.query)
    seeds = torch.randn(2, 4, 37, 20), torch.zeros(2, 4, 37)
    output, _, d_query, d_key, *_ = run(triton_attention, a, seeds, torch.float32)
    assert not d_query.any() and not d_key.any()
    if a.dropout_seed is None:
        assert torch.equal(output, a.value[:, :, 33:].repeat_interleave(2, 1).double())
    seeds = torch.zeros(2, 4, 37, 20), torch.ones(2, 4, 37)
    exact = run(reference_attention, a, seeds, torch.float64)
    for got, want in zip(run(triton_attention, a, seeds, torch.float32)[2:4], exact[2:4], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@interpreted
def test_few_queries_split_keys_and_no_others() -> None:
    def splits(sizes: dict[str, int]) -> int:
        a = problem(sizes, torch.float32)
        tile = triton_attention._Launch(a).tiles.forward
        programs = a.query.shape[0] * a.query.shape[1] * -(-a.query.shape[2] // tile.queries)
        return triton_attention._splits(programs, -(-a.key.shape[2] // tile.keys))

    for sizes, want in (
        ({"B": 1, "Hq": 2, "Lq": 1, "Lk": 300}, 4),
        ({"Lq": 1, "Lk": 70}, 1),
        ({"Lq": 1, "Lk": 10**4}, 32),
    ):
        assert splits({**SIZES, **sizes}) == want
    assert splits({"B": 8, "Lq": 600, "Lk": 600}) == 1


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
        output, lse, _ = ATTENTION_OPS[backend].forward(*a)
        assert (lse == -torch.inf).all() and not any(t.any() for t in torch.autograd.grad(output.sum(), leaves))
    a = problem({"bias": (1, 4, 1, 70), "dropout_p": 0.1, "window_right": 0}, torch.float32)
    leaves = [t.requires_grad_() for t in a[:4] if t is not None]
    grads = [
        torch.autograd.grad(ATTENTION_OPS[backend].forward(*a)[0].sin().sum(), leaves)
        for backend in ("reference", "triton")
    ]
    torch.testing.assert_close(*grads)


FLOATS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "bias")
POINTERS = {name: "*fp32" for name in ("lse", "statistics", "delta", "d_bias", "slopes")}
POINTERS |= {"mask": "*i8", "seed": "*i64", "q_lengths": "*i64", "k_lengths": "*i64"}
NUMBERS = {"scale": "fp32", "factor": "fp32", "softcap": "fp32", "keep_scale": "fp32", "drop_below": "i64"}
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

    module = "attention.forward" if name == "attention_forward" else "attention.backward"
    kernel = getattr(triton_attention._module(module), name)
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
