"""Stage 6: attention on this GPU beside torch's SDPA: parity, then TFLOP/s, forward and backward.

    python benchmarks/gpu/bench_attention.py [--out DIR] [--minutes M]

Contenders: our ``gluon`` (Hopper) and ``triton`` backends; SDPA with cuDNN,
with flash, and by its own choice. Before it is timed a contender is compared with float64 under the rule of
fastgru.testing, on a shorter problem of the same kind. Speeds are TFLOP/s, of 4 B H L^2 D operations forward, half of
that if causal, and 2.5 times that backward; and the fraction of the bf16 matrix product's rate of the same run. What a
contender does not support is written down with its reason. make_table.py makes the table for ``auto`` of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import stage
import torch
import torch.nn.functional as F
from roofline import gpu_roofline
from timing import device_time
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru
from fastgru import testing
from fastgru.backends import measured

# D, causal, L, most wanted first. B L = 16384 and H D = 2048, as in the papers.
SHAPES = [
    *[(128, causal, length) for length in (8192, 1024, 16384, 2048, 4096, 512) for causal in (False, True)],
    *[(64, causal, length) for length in (8192, 1024, 2048) for causal in (False, True)],
    (256, False, 8192), (256, True, 8192),
]  # fmt: skip
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def setting(contender: str) -> AbstractContextManager[Any]:
    """What a contender is called under."""
    if contender in ("gluon", "triton"):
        return fastgru.use_backend(contender)
    return sdpa_kernel(SDPA[contender]) if contender in SDPA else nullcontext()


def function(contender: str) -> Callable[..., Tensor]:
    ours = contender in ("gluon", "triton")
    return fastgru.scaled_dot_product_attention if ours else F.scaled_dot_product_attention


def draw(B: int, H: int, L: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(B, H, L, D, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]


def breaks_the_rule(contender: str, D: int, causal: bool, dtype: torch.dtype) -> str | None:
    """What is wrong with a contender's output or gradients, if anything: they may have twice the error of SDPA's math
    backend, gradients three times."""
    leaves = draw(1, 2, 1111, D, dtype)
    seed = torch.randn_like(leaves[0])

    def results(call: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(to).requires_grad_() for t in leaves]
        output = call(*inputs)
        return [t.double() for t in (output, *torch.autograd.grad(output, inputs, seed.to(to)))]

    def math_backend(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*inputs, is_causal=causal)

    exact, plain = results(math_backend, torch.float64), results(math_backend, dtype)
    found = results(lambda *inputs: function(contender)(*inputs, is_causal=causal), dtype)
    for name, want, theirs, ours in zip(("output", "dq", "dk", "dv"), exact, plain, found, strict=True):
        multiple = testing.MULTIPLE if name == "output" else 3
        result = testing.compare(name, [(ours, theirs, want)], dtype, multiple=multiple)
        if not result.ok:
            return f"breaks the numeric rule: {result}"
    return None


def measure(contender: str, D: int, causal: bool, L: int, dtype: torch.dtype, matmul: float) -> dict[str, Any]:
    B, H = max(1, 16384 // L), 2048 // D
    call = function(contender)
    try:
        with setting(contender):
            broken = breaks_the_rule(contender, D, causal, dtype)
            if broken is not None:
                return {"refused": broken}
            q, k, v = draw(B, H, L, D, dtype)
            with torch.no_grad():
                forward = device_time(lambda: call(q, k, v, is_causal=causal))
            operations = 4 * B * H * L * L * D / (2 if causal else 1)
            entry: dict[str, Any] = {**forward, "tflops": operations / forward["device_us"] / 1e6}
            entry["of_matmul"] = entry["tflops"] / matmul
            output = call(q, k, v, is_causal=causal)
            seed = torch.randn_like(output)
            backward = device_time(lambda: torch.autograd.grad(output, (q, k, v), seed, retain_graph=True))
            entry["backward"] = {**backward, "tflops": 2.5 * operations / backward["device_us"] / 1e6}
            entry["backward"]["of_matmul"] = entry["backward"]["tflops"] / matmul
            return entry
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error).splitlines()[0]}


def main() -> None:
    arguments = stage.parser(__doc__).parse_args()
    stage.require_gpu()
    record = stage.Record("attention", arguments.out, arguments.minutes)
    limits = gpu_roofline()
    record.set(architecture=measured.architecture("cuda"), ceilings=limits)
    for dtype in (torch.bfloat16, torch.float16):
        for D, causal, L in SHAPES:
            name = str(dtype).removeprefix("torch.")
            if record.late(f"{name} D={D} L={L} causal={causal}"):
                continue
            contenders = ("gluon", "triton", "cudnn", "flash", "sdpa")
            record.add(
                precision=name, D=D, causal=causal, L=L, B=max(1, 16384 // L), H=2048 // D,
                contenders={
                    one: measure(one, D, causal, L, dtype, limits[f"{name}_matmul_tflops"]) for one in contenders
                },
            )  # fmt: skip
    record.set(finished=True)
    speeds = [
        (entry["contenders"][one].get("tflops", -math.inf), one, entry["D"], entry["L"], entry["causal"])
        for entry in record.content["entries"] for one in entry["contenders"]
    ]  # fmt: skip
    print(f"fastest forward: {max(speeds, default='nothing measured')}; written to {record.path}")


if __name__ == "__main__":
    main()
