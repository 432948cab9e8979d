"""The CUDA kernels' own source, run on the CPU: every thread a fiber in an order drawn from a seed, messages between
blocks delayed at will (tests/emulation/machine.h). Outputs and all gradients of a layer under the rule of
fastgru.testing, and faults in the exchange that must not go unnoticed.

FASTGRU_EMULATE_LARGE=1 adds sizes up to H = 768, which take minutes.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation.build import load
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastgru import testing
from fastgru.ops.gru.reference import gate_stride

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
INPUT = 5


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the emulation with")
    return load("gru_cluster")


@dataclass(frozen=True)
class Problem:
    precision: str = "bf16"
    H: int = 136
    T: int = 4
    B: int = 3
    D: int = 1
    lengths: tuple[int, ...] | None = None  # packed, longest first
    bias: bool = True
    grad_h_n: bool = True
    cluster: int = 4
    column_tiles: int = 1
    seed: int = 0

    def __str__(self) -> str:
        flags = ["packed"] * (self.lengths is not None) + ["bias"] * self.bias
        sizes = f"T{self.T}-B{self.B}-H{self.H}-D{self.D}-c{self.cluster}x{8 * self.column_tiles}"
        return "-".join([self.precision, sizes, *flags, f"seed{self.seed}"])


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32, to nearest, ties away from zero, as the kernels round."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Product(torch.autograd.Function):
    """a @ b.t() with all operands rounded to TF32, also in the products of its gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return to_tf32(a) @ to_tf32(b).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return to_tf32(grad) @ to_tf32(b), to_tf32(grad).t() @ to_tf32(a)


class Tf32GRU(nn.Module):
    """nn.GRU of one layer in float32 with its products in TF32, for which torch has no switch on the CPU."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, input: PackedSequence, hx: Tensor) -> tuple[PackedSequence, Tensor]:
        gru, sizes = self.gru, input.batch_sizes.tolist()
        outputs, states = [], []
        for direction, suffix in enumerate(["", "_reverse"][: hx.size(0)]):
            w_ih, w_hh = (getattr(gru, f"weight_{kind}_l0{suffix}") for kind in ("ih", "hh"))
            b_ih, b_hh = (getattr(gru, f"bias_{kind}_l0{suffix}") if gru.bias else 0.0 for kind in ("ih", "hh"))
            steps = list((Tf32Product.apply(input.data, w_ih) + b_ih).split(sizes))
            h, output = hx[direction], [torch.empty(0)] * len(steps)
            for t in range(len(steps))[:: -1 if direction else 1]:
                i_r, i_z, i_n = steps[t].chunk(3, 1)
                g_r, g_z, g_n = (Tf32Product.apply(h[: sizes[t]], w_hh) + b_hh).chunk(3, 1)
                r, z = torch.sigmoid(i_r + g_r), torch.sigmoid(i_z + g_z)
                n = torch.tanh(i_n + r * g_n)
                output[t] = n + z * (h[: sizes[t]] - n)
                h = torch.cat([output[t], h[sizes[t] :]])
            outputs.append(torch.cat(output))
            states.append(h)
        return PackedSequence(torch.cat(outputs, 1), input.batch_sizes), torch.stack(states)


def raw(tensor: Tensor | None) -> Any:
    """The memory of a tensor; 16-bit numbers as integers."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


class Layer:
    """A problem with its numbers drawn, and what the rule compares, from three sources."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dtype = DTYPES[problem.precision]
        self.schedule = problem.seed
        H, B, D = problem.H, problem.B, problem.D
        generator = torch.Generator().manual_seed(problem.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(self.dtype).double()

        lengths = problem.lengths or (problem.T,) * B
        assert len(lengths) == B and max(lengths) == problem.T
        self.sizes = [sum(length > t for length in lengths) for t in range(problem.T)]
        self.rows = sum(self.sizes)
        self.exact = nn.GRU(INPUT, H, bias=problem.bias, bidirectional=D == 2, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.exact.parameters():
                parameter.copy_(draw(*parameter.shape, scale=H**-0.5))
        self.input, self.hx = draw(self.rows, INPUT), draw(D, B, H)
        self.grad_output, self.grad_h_n = draw(self.rows, D * H), draw(D, B, H) * problem.grad_h_n
        first = [sum(self.sizes[:t]) for t in range(problem.T + 1)]
        table = torch.tensor([*first, *lengths], dtype=torch.int32)
        self.table = None if problem.lengths is None else table

    def torch(self, dtype: torch.dtype, tf32: bool = False) -> dict[str, Tensor]:
        """Results of nn.GRU in a dtype."""
        gru = nn.GRU(INPUT, self.problem.H, bias=self.problem.bias, bidirectional=self.problem.D == 2, dtype=dtype)
        gru.load_state_dict(self.exact.state_dict())
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (self.input, self.hx)]
        packed = PackedSequence(leaves[0], torch.tensor(self.sizes))
        output, h_n = (Tf32GRU(gru) if tf32 else gru)(packed, leaves[1])
        named = {"input": leaves[0], "hx": leaves[1], **dict(gru.named_parameters())}
        grads = (self.grad_output.to(dtype), self.grad_h_n.to(dtype))
        results = torch.autograd.grad((output.data, h_n), list(named.values()), grads)
        return {"output": output.data, "h_n": h_n, **{f"grad of {n}": g for n, g in zip(named, results, strict=True)}}

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b as a backend computes what is not the recurrence."""
        return to_tf32(a) @ to_tf32(b) if self.problem.precision == "tf32" else a @ b

    def stack(self, name: str) -> Tensor:
        names = [f"{name}_l0", f"{name}_l0_reverse"][: self.problem.D]
        return torch.stack([getattr(self.exact, name).detach().to(self.dtype) for name in names])

    def how(self, fault: str) -> dict[str, Any]:
        p = self.problem
        return {
            "precision": p.precision, "T": p.T, "table": raw(self.table), "w_hh": raw(self.stack("weight_hh")),
            "cluster": p.cluster, "column_tiles": p.column_tiles, "seed": self.schedule, "fault": fault,
        }  # fmt: skip

    def forward(self, emulation: ModuleType, fault: str = "none") -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n, gates."""
        p, bias = self.problem, self.problem.bias
        w_ih = self.stack("weight_ih").flatten(0, 1)
        output = torch.full((self.rows, p.D, p.H), torch.nan, dtype=self.dtype)
        h_n = torch.full((p.D, p.B, p.H), torch.nan, dtype=self.dtype)
        gates = torch.full((p.D, self.rows, 4, gate_stride(p.H)), torch.nan, dtype=self.dtype)
        emulation.forward(
            i=raw(self.product(self.input.to(self.dtype), w_ih.t())),
            b_ih=raw(self.stack("bias_ih")) if bias else None,
            b_hh=raw(self.stack("bias_hh")) if bias else None,
            hx=raw(self.hx.to(self.dtype)), output=raw(output), h_n=raw(h_n), gates=raw(gates), **self.how(fault),
        )  # fmt: skip
        return output, h_n, gates

    def previous(self, output: Tensor) -> Tensor:
        """The state before each row."""
        steps, hx = output.split(self.sizes), self.hx.to(self.dtype)
        before: list[list[Tensor]] = [[], []]
        for t, size in enumerate(self.sizes):
            for direction in range(self.problem.D):
                last = t - 1 if direction == 0 else t + 1
                known = steps[last][:size, direction] if 0 <= last < len(steps) else output[:0, direction]
                before[direction].append(torch.cat([known, hx[direction, known.size(0) : size]]))
        return torch.stack([torch.cat(rows) for rows in before[: self.problem.D]], 1)

    def backward(
        self, emulation: ModuleType, output: Tensor, gates: Tensor, fault: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """grad_gates, grad_hx."""
        p = self.problem
        grad_gates = torch.full((self.rows, 4 * p.D * p.H), torch.nan, dtype=self.dtype)
        grad_hx = torch.full((p.D, p.B, p.H), torch.nan, dtype=self.dtype)
        emulation.backward(
            grad_output=raw(self.grad_output.to(self.dtype)),
            grad_h_n=raw(self.grad_h_n.to(self.dtype)) if p.grad_h_n else None,
            previous=raw(self.previous(output)), gates=raw(gates), grad_gates=raw(grad_gates), grad_hx=raw(grad_hx),
            **self.how(fault),
        )  # fmt: skip
        return grad_gates, grad_hx

    def ours(self, emulation: ModuleType) -> dict[str, Tensor]:
        D, H = self.problem.D, self.problem.H
        output, h_n, gates = self.forward(emulation)
        assert not gates.isnan().any()
        previous = self.previous(output)
        grad_gates, grad_hx = self.backward(emulation, output, gates)
        grad_i, grad_g = grad_gates.split([3 * D * H, D * H], 1)
        results = {
            "output": output.flatten(1),
            "h_n": h_n,
            "grad of input": self.product(grad_i, self.stack("weight_ih").flatten(0, 1)),
            "grad of hx": grad_hx,
        }
        for direction, suffix in enumerate(["", "_reverse"][:D]):
            d_i = grad_i[:, 3 * H * direction :][:, : 3 * H]
            d_h = torch.cat([d_i[:, : 2 * H], grad_g[:, H * direction :][:, :H]], 1)
            results[f"grad of weight_ih_l0{suffix}"] = self.product(d_i.t(), self.input.to(self.dtype))
            results[f"grad of weight_hh_l0{suffix}"] = self.product(d_h.t(), previous[:, direction])
            results[f"grad of bias_ih_l0{suffix}"] = d_i.sum(0, dtype=torch.float32)
            results[f"grad of bias_hh_l0{suffix}"] = d_h.sum(0, dtype=torch.float32)
        return results

    def assert_parity(self, emulation: ModuleType) -> None:
        exact = self.torch(torch.float64)
        theirs = self.torch(self.dtype, tf32=self.problem.precision == "tf32")
        ours = self.ours(emulation)
        for name, reference in exact.items():
            found = testing.compare(name, [(ours[name], theirs[name], reference)], self.dtype)
            assert found.ok, found


PROBLEMS = [
    Problem("bf16"),
    Problem("f16", seed=1),
    Problem("tf32", seed=2),
    Problem("bf16", D=2, B=11, seed=3),
    Problem("bf16", H=131, B=11, D=2, cluster=8, column_tiles=2, lengths=(4, 4, 4, 3, 3, 3, 2, 2, 1, 1, 1), seed=4),
    Problem("f16", H=133, B=9, T=3, D=2, cluster=5, lengths=(3, 3, 3, 3, 2, 2, 1, 1, 1), bias=False, seed=5),
    Problem("tf32", H=129, B=17, T=3, cluster=9, column_tiles=2, grad_h_n=False, seed=6),
    Problem("tf32", H=145, B=9, T=3, D=2, cluster=4, lengths=(3, 3, 2, 2, 2, 2, 1, 1, 1), seed=7),
    Problem("bf16", H=136, B=1, T=1, seed=8),
    # More weights than registers hold, forwards too.
    Problem("bf16", H=300, T=2, B=2, seed=9),
    Problem("tf32", H=257, T=2, B=9, cluster=6, column_tiles=2, seed=10),
]


# On a cluster of 16, as on a GPU.
LARGE = [
    Problem("bf16", H=256, B=8, cluster=16, seed=20),
    Problem("bf16", H=512, B=9, D=2, cluster=16, seed=21),
    Problem("f16", H=768, B=3, T=3, cluster=16, seed=22),
    Problem("bf16", H=768, B=10, T=3, cluster=16, column_tiles=2, lengths=(3, 3, 3, 3, 3, 2, 2, 1, 1, 1), seed=23),
    Problem("tf32", H=384, B=3, cluster=16, seed=24),
    Problem("tf32", H=512, B=9, T=3, cluster=16, column_tiles=2, seed=25),
    Problem("bf16", H=256, B=17, D=2, cluster=8, lengths=(4,) * 9 + (3,) * 4 + (2, 2, 1, 1), seed=26),
]
if os.environ.get("FASTGRU_EMULATE_LARGE") == "1":
    PROBLEMS += LARGE


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_parity(emulation: ModuleType, problem: Problem) -> None:
    Layer(problem).assert_parity(emulation)


@pytest.mark.parametrize("precision, largest", [("bf16", 768), ("f16", 768), ("tf32", 512)])
def test_hidden_sizes(emulation: ModuleType, precision: str, largest: int) -> None:
    shapes = [(cluster, tiles) for cluster in (16, 8, 4) for tiles in (1, 2)]
    for direction in ("forward", "backward"):
        used = {
            H: [emulation.shared_bytes(direction, precision, H, *shape) for shape in shapes] for H in range(1, 1100)
        }
        fits = [H for H, all_bytes in used.items() if any(0 < size <= 227 * 1024 for size in all_bytes)]
        assert set(range(129, largest + 1)) <= set(fits), direction


def test_same_bits_whatever_the_order(emulation: ModuleType) -> None:
    results = [Layer(Problem("f16", T=3)).ours(emulation)]
    for seed in range(12):
        layer = Layer(Problem("f16", T=3))
        layer.schedule = seed
        results.append(layer.ours(emulation))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results), name


UNORDERED = "a word (whose write it need not see|that may still be read|that another write may still reach)"
# What is wrong with one block, and how that shows.
SIGNS = {
    "wrong phase": f"{UNORDERED}|more arrivals at a barrier",
    "missing wait": f"{UNORDERED}|more arrivals at a barrier",
    "lost message": "nothing can go on: .* wait for a message",
    "early delivery": UNORDERED,
    "no block barrier": UNORDERED,
    "no cluster start": f"{UNORDERED}|before its barrier was initialised",
}


@pytest.mark.parametrize("fault", SIGNS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_faults_do_not_go_unnoticed(emulation: ModuleType, direction: str, fault: str) -> None:
    layer = Layer(Problem())
    output, _, gates = layer.forward(emulation)
    forward, backward = partial(layer.forward, emulation), partial(layer.backward, emulation, output, gates)
    run = forward if direction == "forward" else backward
    for seed in range(12):
        layer.schedule = seed
        with pytest.raises(RuntimeError, match=SIGNS[fault]):
            run(fault)
