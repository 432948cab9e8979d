"""The backend around the kernels in CUDA C++: on a GPU where there is one; its structure, on the CPU, with loops in
plain torch in the place of the kernels."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import gru_operators
import pytest
import torch
from emulation.build import load
from test_cuda_emulation import DTYPES, raw
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastgru
from fastgru.backends import cuda as backend
from fastgru.backends import measured, registry
from fastgru.ops.gru import cuda, recurrence
from fastgru.ops.gru.recurrence import Layer
from fastgru.ops.gru.reference import gate_stride, steps_of
from fastgru.ops.gru.schema import GRU_OPS
from fastgru.testing import GruProblem, assert_parity

# conftest.py asks for deterministic algorithms, and then cuBLAS wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class TorchKernels:
    """What fastgru.ops.gru.recurrence.Kernels asks for. It sees of a problem only what a kernel sees."""

    def upload(self, table: Tensor, device: torch.device) -> Tensor:
        return table.clone()

    @staticmethod
    def steps(layer: Layer, direction: int) -> list[tuple[int, int]]:
        """(first row, rows) of each step, in the order of the recurrence; of a packed batch by its table alone."""
        if layer.table is None:
            return list(steps_of(layer.sizes, reverse=direction == 1))
        T, B = len(layer.sizes), layer.batch
        first, lengths = layer.table[: T + 1].tolist(), layer.table[T + 1 :].tolist()
        assert len(lengths) == B
        order = range(T) if direction == 0 else range(T - 1, -1, -1)
        steps = [(first[t], sum(length > t for length in lengths)) for t in order]
        assert all(first[t + 1] - first[t] == size for t, (_, size) in zip(order, steps, strict=True))
        return steps

    @staticmethod
    def equations(layer: Layer, direction: int, i: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """r, z, n, W_hn h + b_hn [rows, H] in float32."""
        if layer.b_ih is not None and layer.b_hh is not None:
            i, g = i + layer.b_ih[direction].float(), g + layer.b_hh[direction].float()
        (i_r, i_z, i_n), (g_r, g_z, g_n) = i.chunk(3, 1), g.chunk(3, 1)
        r, z = torch.sigmoid(i_r + g_r), torch.sigmoid(i_z + g_z)
        return r, z, torch.tanh(i_n + r * g_n), g_n

    @staticmethod
    def save(layer: Layer, direction: int, rows: slice, values: tuple[Tensor, ...], gates: Tensor) -> None:
        gates = gates.view(layer.directions, layer.rows, 4, gate_stride(layer.hidden))
        for kind, value in enumerate(values):
            gates[direction, rows, kind, : layer.hidden] = value.to(gates.dtype)
            gates[direction, rows, kind, layer.hidden :] = 0

    def forward(self, layer: Layer, projected: Tensor, output: Tensor, h_n: Tensor, gates: Tensor | None) -> None:
        i = projected.view(layer.rows, layer.directions, -1)
        for d in range(layer.directions):
            h = layer.hx[d].to(torch.float32, copy=True)
            for row, size in self.steps(layer, d):
                rows = slice(row, row + size)
                g = h[:size].to(projected.dtype).float() @ layer.w_hh[d].float().t()
                values = self.equations(layer, d, i[rows, d].float(), g)
                _, z, n, _ = values
                h[:size] = n + z * (h[:size] - n)
                output.view(layer.rows, layer.directions, -1)[rows, d] = h[:size].to(output.dtype)
                if gates is not None:
                    self.save(layer, d, rows, values, gates)
            h_n[d] = h.to(h_n.dtype)

    def previous_states(self, layer: Layer, output: Tensor, previous: Tensor) -> None:
        for d in range(layer.directions):
            h = layer.hx[d].clone()
            for row, size in self.steps(layer, d):
                previous[row : row + size, d] = h[:size]
                h[:size] = output.view(layer.rows, layer.directions, -1)[row : row + size, d]

    def gates(self, layer: Layer, projected: Tensor, recurrent: Tensor, gates: Tensor) -> None:
        i = projected.view(layer.rows, layer.directions, -1)
        for d in range(layer.directions):
            values = self.equations(layer, d, i[:, d].float(), recurrent[:, d].float())
            self.save(layer, d, slice(None), values, gates)

    def backward(
        self, layer: Layer, grad_output: Tensor | None, grad_h_n: Tensor | None, previous: Tensor, gates: Tensor,
        grad_gates: Tensor, grad_hx: Tensor,
    ) -> None:  # fmt: skip
        D, H = layer.directions, layer.hidden
        saved = gates.view(D, layer.rows, 4, gate_stride(H))[..., :H].float()
        for d in range(D):
            carry = torch.zeros_like(layer.hx[d], dtype=torch.float32)
            if grad_h_n is not None:
                carry += grad_h_n[d]
            for row, size in reversed(self.steps(layer, d)):
                rows = slice(row, row + size)
                r, z, n, g_n = saved[d, rows].unbind(1)
                total = carry[:size]
                if grad_output is not None:
                    total = total + grad_output.view(layer.rows, D, H)[rows, d].float()
                d_n = total * (1 - z) * (1 - n * n)
                d_z = total * (previous[rows, d].float() - n) * z * (1 - z)
                d_r = d_n * g_n * r * (1 - r)
                d_r, d_z, d_n, d_g = (t.to(grad_gates.dtype) for t in (d_r, d_z, d_n, d_n * r))
                grad_gates[rows, 3 * H * d : 3 * H * (d + 1)] = torch.cat((d_r, d_z, d_n), 1)
                grad_gates[rows, 3 * H * D + H * d :][:, :H] = d_g
                carry[:size] = total * z + torch.cat((d_r, d_z, d_g), 1).float() @ layer.w_hh[d].float()
            grad_hx[d] = carry.to(grad_hx.dtype)


HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    """The operators on CPU tensors as well."""
    made = torch.library.Library("fastgru", "IMPL")
    for kind in ("infer", "train", "backward"):
        made.impl(f"cuda_gru_{kind}", getattr(cuda, f"gru_{kind}"), "CPU")
    yield made
    made._destroy()


@pytest.fixture
def kernels(library: torch.library.Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """On the CPU, the backend with loops in torch; on a GPU as it is."""
    if HAS_GPU:
        yield cuda.KERNELS
        return
    stand_in = TorchKernels()
    usual = registry._backends["cuda"]
    monkeypatch.setattr(cuda.operators, "kernels", stand_in)
    monkeypatch.setattr(cuda, "_turned_down", {})
    monkeypatch.setattr(cuda, "_why_not", lambda key: "")
    monkeypatch.setattr(registry, "_warned", set())
    registry.register(dataclasses.replace(usual, devices=("cuda", "cpu"), available=lambda: None, priority=999))
    yield stand_in
    registry.register(usual)


@pytest.fixture
def chosen(kernels: Any) -> Iterator[Any]:
    """Chooses the backend, and holds float32 to float32 in every library: cuDNN's default is TF32."""
    # Not by the attribute, which torch's own test modules freeze where they are imported.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastgru.use_backend("cuda"):
        yield kernels


HALF, BRAIN = torch.float16, torch.bfloat16
PROBLEMS = [
    GruProblem(H=1, I=1, T=1, B=1, dtype=BRAIN),
    GruProblem(H=7, I=5, T=4, B=17, bidirectional=True, packed=True, dtype=BRAIN),
    GruProblem(H=16, I=3, B=3, bias=False, num_layers=2, bidirectional=True, dtype=HALF),
    GruProblem(H=33, I=4, B=2, hx=False, batch_first=True, dtype=BRAIN),
    GruProblem(H=64, I=8, T=3, B=20, packed=True, dtype=HALF),
    GruProblem(H=160, I=40, B=5, packed=True, bidirectional=True, dtype=BRAIN),
    GruProblem(H=31, I=31, T=9, B=1, bidirectional=True, bias=False, packed=True, dtype=HALF),
]
EXACT = [dataclasses.replace(problem, dtype=torch.float32) for problem in PROBLEMS[:4]]


@pytest.mark.parametrize("save_gates", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("problem", PROBLEMS if HAS_GPU else PROBLEMS + EXACT, ids=str)
def test_parity(chosen: Any, problem: GruProblem, save_gates: bool) -> None:
    assert_parity(dataclasses.replace(problem, device=DEVICE), save_gates)


class EmulatedKernels(TorchKernels):
    """The kernels themselves, on the CPU: see test_cuda_emulation.py."""

    def __init__(self, loop: str) -> None:
        self.rows = load("gru_grid")
        self.loop = load("gru_cluster") if loop == "cluster" else self.rows
        self.options = {"cluster": 4} if loop == "cluster" else {"each_direction": False}

    def how(self, layer: Layer, dtype: torch.dtype) -> dict[str, Any]:
        name = next(name for name, known in DTYPES.items() if known == dtype)
        given = {"precision": name, "T": len(layer.sizes), "table": raw(layer.table), "w_hh": raw(layer.w_hh)}
        return given | {"column_tiles": 1, "seed": 0} | self.options

    def forward(self, layer: Layer, projected: Tensor, output: Tensor, h_n: Tensor, gates: Tensor | None) -> None:
        self.loop.forward(
            i=raw(projected), b_ih=raw(layer.b_ih), b_hh=raw(layer.b_hh), hx=raw(layer.hx), output=raw(output),
            h_n=raw(h_n), gates=raw(gates), **self.how(layer, output.dtype),
        )  # fmt: skip

    def previous_states(self, layer: Layer, output: Tensor, previous: Tensor) -> None:
        self.rows.previous_states(len(layer.sizes), raw(output), raw(layer.hx), raw(layer.table), raw(previous))

    def gates(self, layer: Layer, projected: Tensor, recurrent: Tensor, gates: Tensor) -> None:
        name = self.how(layer, gates.dtype)["precision"]
        i = projected.view(recurrent.shape)
        self.rows.gates(name, raw(i), raw(recurrent), raw(layer.b_ih), raw(layer.b_hh), raw(gates))

    def backward(
        self, layer: Layer, grad_output: Tensor | None, grad_h_n: Tensor | None, previous: Tensor, gates: Tensor,
        grad_gates: Tensor, grad_hx: Tensor,
    ) -> None:  # fmt: skip
        self.loop.backward(
            grad_output=raw(grad_output), grad_h_n=raw(grad_h_n), previous=raw(previous), gates=raw(gates),
            grad_gates=raw(grad_gates), grad_hx=raw(grad_hx), **self.how(layer, grad_hx.dtype),
        )  # fmt: skip


@pytest.mark.skipif(HAS_GPU, reason="the kernels run on the GPU")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler for the emulation")
@pytest.mark.parametrize("save_gates", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("loop, H, dtype", [("cluster", 131, BRAIN), ("grid", 33, BRAIN), ("grid", 40, HALF)])
def test_parity_of_the_emulated_kernels(
    chosen: Any, monkeypatch: pytest.MonkeyPatch, loop: str, H: int, dtype: torch.dtype, save_gates: bool
) -> None:
    """From the module down to the kernels' source."""
    monkeypatch.setattr(cuda.operators, "kernels", EmulatedKernels(loop))
    packed = save_gates
    assert_parity(
        GruProblem(H=H, I=9, T=4, B=3, bidirectional=True, packed=packed, bias=packed, dtype=dtype), save_gates
    )


def layer(*case: bool, **options: Any) -> list[Tensor | None]:
    return gru_operators.layer(*case, device=DEVICE, dtype=BRAIN, **options)


CASES = [(False, True, True), (True, True, False), (True, False, True)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", CASES, ids=str)
class TestOperators(gru_operators.Contract):
    ops = GRU_OPS["cuda"]
    layer = staticmethod(layer)

    def test_opcheck(self, case: tuple[bool, bool, bool]) -> None:
        torch.library.opcheck(self.ops.infer, tuple(layer(*case)))
        torch.library.opcheck(self.ops.train, tuple(layer(*case, requires_grad=True)))
        for needs in ((True, True), (False, False)):
            arguments = gru_operators.backward_arguments(self.ops, layer(*case))
            torch.library.opcheck(self.ops.backward, (*arguments, *needs))

    def test_gates_of_other_backends_serve(self, case: tuple[bool, bool, bool]) -> None:
        """Who takes over what a launch refuses finds the gates where it looks for them, and leaves them there."""
        arguments = layer(*case)
        ours, theirs = GRU_OPS["cuda"].train(*arguments), GRU_OPS["reference"].train(*arguments)
        assert ours[2].shape == theirs[2].shape
        eps = torch.finfo(BRAIN).eps
        H, stride = ours[1].size(2), gate_stride(ours[1].size(2))
        for mine, other in zip(*(t[2].view(-1, 4, stride)[..., :H] for t in (ours, theirs)), strict=True):
            torch.testing.assert_close(mine, other, rtol=4 * eps, atol=4 * eps)


def test_an_empty_batch(kernels: Any) -> None:
    arguments = layer(False, True, B=0)
    output, h_n, gates = GRU_OPS["cuda"].train(*arguments)
    assert output.shape == (4, 0, 14) and h_n.shape == (2, 0, 7)
    grads = GRU_OPS["cuda"].backward(output, h_n, *arguments, output, gates, True, True)
    assert all(bool((g == 0).all()) for g in grads)


def test_double_backward(chosen: Any) -> None:
    def second_derivatives() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        module = fastgru.GRU(5, 7, bidirectional=True, device=DEVICE, dtype=torch.float32 if not HAS_GPU else BRAIN)
        x = torch.randn(4, 3, 5, device=DEVICE, dtype=module.weight_hh_l0.dtype, requires_grad=True)
        output, h_n = module(x)
        first = torch.autograd.grad(output.sin().sum() + h_n.cos().sum(), [x, *module.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *module.parameters()])

    got = second_derivatives()
    with fastgru.use_backend("reference"):
        want = second_derivatives()
    tolerance = 0.05 if HAS_GPU else 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_compiled(chosen: Any) -> None:
    module = fastgru.GRU(5, 7, device=DEVICE, dtype=BRAIN)
    x = torch.randn(4, 3, 5, device=DEVICE, dtype=BRAIN, requires_grad=True)
    want = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x)[0].sum(), [x, *module.parameters()]), want)


# Refusals


class Refusing(TorchKernels):
    """Kernels whose launches are turned down."""

    def __init__(self, *passes: str) -> None:
        self.passes = passes
        self.refused: list[str] = []

    def forward(self, *arguments: Any) -> None:
        if "forward" not in self.passes:
            self.refused.append("forward")
            cuda._raise_if("too many resources requested for launch")
        super().forward(*arguments)

    def backward(self, *arguments: Any) -> None:
        if "backward" not in self.passes:
            self.refused.append("backward")
            cuda._raise_if("too many resources requested for launch")
        super().backward(*arguments)


@pytest.fixture
def wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table by which the backend is the fastest on this machine, at every size."""
    monkeypatch.setattr(measured, "wins", lambda backend, device, dtype, sizes: backend == "cuda")


no_gpu = pytest.mark.skipif(HAS_GPU, reason="no launch is refused here")
REASON = "because cuda: too many resources requested for launch"


@no_gpu
@pytest.mark.parametrize("passes", [(), ("forward",), ("backward",)], ids=str)
def test_auto_goes_on_where_a_launch_is_refused_and_says_so_once(
    kernels: Any, wins: None, monkeypatch: pytest.MonkeyPatch, passes: tuple[str, ...]
) -> None:
    refusing = Refusing(*passes)
    monkeypatch.setattr(cuda.operators, "kernels", refusing)
    module = fastgru.GRU(5, 7, bidirectional=True, dtype=BRAIN)
    x = torch.randn(4, 3, 5, dtype=BRAIN)

    def run() -> list[Tensor]:
        output, h_n = module(x)
        return [output, h_n, *torch.autograd.grad(output.sum() + h_n.sum(), list(module.parameters()))]

    with fastgru.use_backend("reference"):
        want = run()
    with fastgru.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match=f"with the backend '(triton|reference)', {REASON}"):
            got = run()
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Known by now: it is not tried again.
            run()
    assert refusing.refused == [name for name in ("forward", "backward") if name not in passes]


@no_gpu
def test_asked_for_by_name_a_refused_launch_raises(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.operators, "kernels", Refusing())
    with pytest.raises(fastgru.BackendUnavailable, match=r"'cuda' cannot run .*: too many resources .*use_backend"):
        fastgru.GRU(5, 7, dtype=BRAIN)(torch.randn(4, 3, 5, dtype=BRAIN))


@no_gpu
def test_float32_without_tf32_is_refused_by_the_library_and_goes_on(
    kernels: Any, wins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library says before a launch is heard at the choice of the backend."""
    asked: list[tuple[Any, ...]] = []

    def why_not(key: tuple[Any, ...]) -> str:
        asked.append(key)
        return "" if key[5] else "it multiplies float32 as TF32"

    monkeypatch.setattr(cuda, "_why_not", why_not)
    module, x = fastgru.GRU(5, 7), torch.randn(4, 3, 5)
    with fastgru.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match="because cuda: it multiplies float32 as TF32"):
            module(x)
        assert asked[-1] == (None, torch.float32, 7, 3, 1, False, "")
        monkeypatch.setattr(recurrence, "tf32", lambda: True)
        ran: list[bool] = []
        monkeypatch.setattr(
            kernels, "forward", lambda *arguments: ran.append(TorchKernels.forward(kernels, *arguments))
        )
        module(x)
        assert ran and asked[-1][5]


def raises(*_: Any) -> Any:
    raise RuntimeError("fastgru: no code of this build runs on CUDA device 0: no kernel image is available")


def missing() -> Any:
    raise NotImplementedError


REASONS = {
    "without its CUDA part; install its wheel for your CUDA": {"versions": missing},
    "this torch is not built for CUDA; install a build": {"torch_cuda": None},
    "the driver runs CUDA 12.4 and this build needs 13.0; update the driver": {"versions": lambda: (13010, 12040)},
    "torch finds no usable GPU; check the driver": {"usable": False},
    "compute capability 7.5 and 8.0 is the oldest": {"capability": (7, 5)},
    "no code of this build runs on CUDA device 0.*; build fastgru with TORCH_CUDA_ARCH_LIST=9.0": {"code": raises},
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_it_cannot_run_and_the_remedy(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = REASONS[reason]
    monkeypatch.setattr("fastgru._library.load_error", None)
    monkeypatch.setattr(torch.ops.fastgru, "cuda_versions", case.get("versions", lambda: (13000, 13000)))
    monkeypatch.setattr(torch.ops.fastgru, "cuda_code_architecture", case.get("code", lambda device: 90))
    monkeypatch.setattr(torch.version, "cuda", case.get("torch_cuda", "13.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: case.get("usable", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: case.get("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    backend._available.cache_clear()
    try:
        with pytest.raises(fastgru.BackendUnavailable, match=f"backend 'cuda' cannot run: .*{reason}"):
            fastgru.use_backend("cuda")
        assert re.search(rf"cuda: not used: .*{reason}", fastgru.explain("cuda", BRAIN))
    finally:
        backend._available.cache_clear()


def test_float64_is_refused(chosen: Any) -> None:
    module = fastgru.GRU(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(fastgru.BackendUnavailable, match=r"'cuda' cannot run .*no kernels for torch.float64"):
        module(torch.randn(4, 1, 2, dtype=torch.float64, device=DEVICE))


# On a GPU alone

gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


@pytest.fixture(params=["cluster", "grid"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each kernel for the recurrence."""
    monkeypatch.setattr(cuda.KERNELS, "loop", request.param)
    return str(request.param)


def skip_if_refused(H: int, B: int, directions: int, dtype: torch.dtype) -> None:
    sizes = registry.Sizes(H, B, 1, directions, True, False)
    reason = cuda.refuses(torch.device("cuda", 0), dtype, sizes)
    if reason is not None:
        pytest.skip(reason)


@gpu
@pytest.mark.parametrize("save_gates", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    "problem",
    [
        GruProblem(T=130, B=30, I=128, H=512, dtype=BRAIN, bidirectional=True),
        GruProblem(T=60, B=16, I=64, H=1024, dtype=HALF),
        GruProblem(T=64, B=21, I=256, H=333, packed=True, bidirectional=True, dtype=BRAIN),
        GruProblem(T=600, B=7, I=32, H=767, dtype=BRAIN, packed=True),
        GruProblem(T=40, B=3, I=32, H=2048, dtype=BRAIN),
    ],
    ids=str,
)
def test_parity_of_larger_problems(chosen: Any, loop: str, problem: GruProblem, save_gates: bool) -> None:
    skip_if_refused(problem.H, problem.B, 2 if problem.bidirectional else 1, problem.dtype)
    assert_parity(dataclasses.replace(problem, device=DEVICE), save_gates)


@gpu
def test_tf32_where_torch_allows_it(loop: str) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        skip_if_refused(256, 16, 1, torch.float32)
        with fastgru.use_backend("cuda"):
            assert_parity(GruProblem(H=256, I=64, T=20, B=16, device=DEVICE))
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@gpu
@pytest.mark.parametrize("packed", [False, True])
def test_captured_in_a_cuda_graph_without_a_synchronisation(chosen: Any, loop: str, packed: bool) -> None:
    skip_if_refused(256, 4, 1, BRAIN)
    module = fastgru.GRU(256, 256, device=DEVICE, dtype=BRAIN).requires_grad_(False)
    x = torch.randn(6, 4, 256, device=DEVICE, dtype=BRAIN)
    sequence: Any = pack_padded_sequence(x, [6, 5, 2, 1]) if packed else x
    data = sequence.data if packed else x
    want = module(sequence)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(sequence)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = module(sequence)
    for _ in range(3):
        data.copy_(torch.randn_like(data))
        graph.replay()
        torch.cuda.synchronize()
        want = module(sequence)
        for a, b in zip(got, want, strict=True):
            a, b = (t.data if packed and not isinstance(t, Tensor) else t for t in (a, b))
            assert torch.equal(a, b)


@gpu
def test_what_is_too_large_is_refused_with_the_reason(chosen: Any) -> None:
    module = fastgru.GRU(8, 4096, device=DEVICE, dtype=BRAIN)
    with pytest.raises(fastgru.BackendUnavailable, match=r"'cuda' cannot run .*cluster kernel: .*; grid kernel: "):
        module(torch.randn(2, 3, 8, device=DEVICE, dtype=BRAIN))


@gpu
def test_a_layer_on_another_device_and_stream(chosen: Any) -> None:
    module = fastgru.GRU(256, 256, device=f"cuda:{torch.cuda.device_count() - 1}", dtype=BRAIN)
    x = torch.randn(6, 4, 256, device=module.weight_hh_l0.device, dtype=BRAIN)
    want = module(x)[0]
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        got = module(x)[0]
    stream.synchronize()
    assert torch.equal(got, want)
