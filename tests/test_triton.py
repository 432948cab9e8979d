"""The Triton kernels: on a GPU where there is one, else on the CPU in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gru_operators
import pytest
import torch
from torch import Tensor

import fastgru
from fastgru.backends.triton import INTERPRETED, _missing
from fastgru.ops.gru import triton as backend
from fastgru.ops.gru.recurrence import Layer
from fastgru.ops.gru.schema import GRU_OPS
from fastgru.testing import GruProblem, assert_parity

# conftest.py asks for deterministic algorithms, and then cuBLAS wants this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
RUNS_HERE = HAS_GPU or INTERPRETED

here = pytest.mark.skipif(not RUNS_HERE, reason="runs on a GPU, or in the process that test_in_the_interpreter starts")
gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.parametrize("part", ["resident", "step", "operators"])
def test_in_the_interpreter(part: str) -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", __file__, "-k", part],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d{2,} passed", result.stdout, re.MULTILINE), result.stdout


@pytest.fixture
def chosen() -> Iterator[None]:
    """Chooses the backend, and holds float32 to float32 in every library: cuDNN's default is TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with fastgru.use_backend("triton"):
        yield
    torch.backends.cudnn.allow_tf32 = before


HALF, BRAIN = torch.float16, torch.bfloat16
RESIDENT = [
    GruProblem(H=1, I=1, T=1, B=1),
    GruProblem(H=7, I=5, T=4, B=17, bidirectional=True, packed=True),
    GruProblem(H=16, I=3, B=3, bias=False, num_layers=2, bidirectional=True),
    GruProblem(H=33, I=4, B=2, hx=False, batch_first=True),
    GruProblem(H=64, I=8, T=3, B=20, packed=True),
    GruProblem(H=20, B=5, packed=True, bidirectional=True, dtype=BRAIN),
    GruProblem(H=24, B=3, bias=False, dtype=HALF),
    GruProblem(H=100, T=3, B=2, packed=True, dtype=HALF),
    GruProblem(H=31, I=31, T=9, B=1, bidirectional=True, dtype=BRAIN),
]
STEP = [
    GruProblem(H=65, I=9, T=4, B=5),
    GruProblem(H=70, T=3, B=18, bidirectional=True, packed=True),
    GruProblem(H=66, T=4, B=3, num_layers=2, bias=False, packed=True),
    GruProblem(H=67, T=3, B=33, hx=False, batch_first=True),
    GruProblem(H=129, T=2, B=3, packed=True, dtype=BRAIN),
    GruProblem(H=130, T=2, B=66, dtype=HALF),
    GruProblem(H=131, T=1, B=1, bias=False, packed=True, dtype=HALF),
]


def is_resident(problem: GruProblem) -> bool:
    return backend.plan(problem.H, problem.B, 1, problem.dtype, False).resident


@here
@pytest.mark.parametrize("save_gates", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("problem", RESIDENT, ids=str)
def test_parity_of_resident_weights(chosen: None, problem: GruProblem, save_gates: bool) -> None:
    assert is_resident(problem)
    assert_parity(GruProblem(**vars(problem) | {"device": DEVICE}), save_gates)


@here
@pytest.mark.parametrize("save_gates", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("problem", STEP, ids=str)
def test_parity_of_one_launch_per_step(chosen: None, problem: GruProblem, save_gates: bool) -> None:
    assert not is_resident(problem)
    assert_parity(GruProblem(**vars(problem) | {"device": DEVICE}), save_gates)


@here
@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"save_gates": False}], ids=str)
def test_operators_have_second_derivatives_and_batched_ones(chosen: None, options: dict[str, Any]) -> None:
    module = fastgru.GRU(3, 4, **options).to(DEVICE)
    x = torch.randn(3, 2, 3, device=DEVICE)
    seeds = torch.randn(3, 3, 2, 4 * (2 if module.bidirectional else 1), device=DEVICE)

    def derivatives(dtype: torch.dtype) -> list[Tensor]:
        run = copy.deepcopy(module).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        output, _ = run(leaf)
        batched = torch.autograd.grad(output, leaf, seeds.to(dtype), retain_graph=True, is_grads_batched=True)
        (first,) = torch.autograd.grad(output.sin().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.sin().sum(), [leaf, *run.parameters()])
        return [t.detach().double() for t in (*batched, first, *second)]

    got = derivatives(torch.float32)
    with fastgru.use_backend("reference"):
        want = derivatives(torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def layer(H: int, packed: bool, bidirectional: bool, **options: Any) -> list[Tensor | None]:
    return gru_operators.layer(packed, bidirectional, H=H, device=DEVICE, **options)


LAYERS = [(7, False, True), (66, True, True)]


@here
@pytest.mark.parametrize("case", LAYERS, ids=str)
class TestOperators(gru_operators.Contract):
    ops = GRU_OPS["triton"]
    layer = staticmethod(layer)

    def test_opcheck(self, case: tuple[int, bool, bool]) -> None:
        # The tests of tracing run the kernels a dozen times, and look at nothing that depends on H.
        case = (7, *case[1:])
        torch.library.opcheck(self.ops.infer, tuple(layer(*case)))
        torch.library.opcheck(self.ops.train, tuple(layer(*case, requires_grad=True)))
        arguments = gru_operators.backward_arguments(self.ops, layer(*case))
        torch.library.opcheck(self.ops.backward, (*arguments, True, True))


@here
@pytest.mark.parametrize("H", [7, 66])
def test_operators_take_an_empty_batch(H: int) -> None:
    arguments = layer(H, False, True, B=0)
    output, h_n, gates = GRU_OPS["triton"].train(*arguments)
    assert output.shape == (4, 0, 2 * H) and h_n.shape == (2, 0, H)
    grads = GRU_OPS["triton"].backward(output, h_n, *arguments, output, gates, True, True)
    assert all(bool((g == 0).all()) for g in grads)


@here
def test_operators_refuse_sizes_that_do_not_fit() -> None:
    arguments = layer(7, True, False)
    arguments[-1] = torch.tensor([3, 2, 2, 2])
    with pytest.raises(RuntimeError, match="batch_sizes must start at the batch size 3, never grow, and sum to the 8"):
        GRU_OPS["triton"].infer(*arguments)


@here
@pytest.mark.parametrize("missing", [(4,), (5,), (4, 8), (9,), (4, 5, 8)], ids=str)
def test_operators_take_a_missing_bias_for_zero(missing: tuple[int, ...]) -> None:
    arguments = layer(7, False, True)
    zeros = list(arguments)
    for i in missing:
        arguments[i], zeros[i] = None, torch.zeros(21, device=DEVICE)
    for a, b in zip(GRU_OPS["triton"].train(*arguments), GRU_OPS["triton"].train(*zeros), strict=True):
        assert torch.equal(a, b)


@here
@pytest.mark.parametrize("wrong", [2, 3, 4, 5], ids=["w_ih", "w_hh", "b_ih", "b_hh"])
def test_operators_refuse_weights_that_do_not_fit(wrong: int) -> None:
    arguments = layer(7, False, False)
    tensor = arguments[wrong]
    assert tensor is not None
    arguments[wrong] = tensor[:-3]
    with pytest.raises(RuntimeError, match=r"expected a weight or bias of shape \[21"):
        GRU_OPS["triton"].infer(*arguments)


@here
def test_operators_leave_results_that_may_be_overwritten(chosen: None) -> None:
    module = fastgru.GRU(3, 4, device=DEVICE)
    x = torch.randn(3, 2, 3, device=DEVICE)
    results = []
    for in_place in (False, True):
        output, h_n = module(x)
        output = output.mul_(2) if in_place else output * 2
        h_n = h_n.mul_(2) if in_place else h_n * 2
        results.append(torch.autograd.grad(output.square().sum() + h_n.sum(), list(module.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@here
def test_operators_refuse_float64(chosen: None) -> None:
    module = fastgru.GRU(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(fastgru.BackendUnavailable, match=r"'triton' cannot run .*no kernels for torch.float64"):
        module(torch.randn(4, 1, 2, dtype=torch.float64, device=DEVICE))


@pytest.mark.skipif(RUNS_HERE, reason="Triton can run here")
def test_why_it_cannot_run_and_the_remedy() -> None:
    with pytest.raises(fastgru.BackendUnavailable, match=r"backend 'triton' cannot run: .*(install|check)"):
        fastgru.use_backend("triton")


@pytest.mark.skipif(_missing() is not None or INTERPRETED, reason="needs Triton, not its interpreter")
@pytest.mark.parametrize("backward", [False, True])
def test_every_launch_passes_what_the_first_one_did(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    from fastgru.kernels.gru.backward import gru_backward_step
    from fastgru.kernels.gru.forward import gru_forward_step

    names = (gru_backward_step if backward else gru_forward_step).arg_names
    calls: list[dict[str, Any]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            assert grid == (1, 5, 2)
            return lambda *args, stream: calls.append(dict(zip(names, args, strict=True)) | {"stream": stream})

    class Kernel:
        arg_names = names

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def first(
                *args: Any, num_warps: int, num_stages: int, enable_fp_fusion: bool, **constants: Any
            ) -> Compiled:
                given = names[: len(args)]
                assert set(constants) == set(names) - set(given)
                calls.append(dict(zip(given, args, strict=True)) | constants | {"stream": 17})
                return Compiled()

            return first

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 17}))
    work = Layer(backend.operators.kernels, *layer(66, True, True))
    tensors = tuple(name for name in names if name.endswith("_ptr"))
    backend.each_step(work, Kernel(), tensors, backend.plan(66, 3, 2, torch.float32, False), backward)
    scalars = ("token_0", "size_0", "last_token_0", "last_size_0", "token_1", "size_1", "last_token_1", "last_size_1")
    forward = [(0, 3, 0, 0, 7, 1, 0, 0), (3, 2, 0, 3, 5, 2, 7, 1), (5, 2, 3, 2, 3, 2, 5, 2), (7, 1, 5, 2, 0, 3, 3, 2)]
    reverse = [(7, 1, 0, 0, 0, 3, 0, 0), (5, 2, 7, 1, 3, 2, 0, 3), (3, 2, 5, 2, 5, 2, 3, 2), (0, 3, 3, 2, 7, 1, 5, 2)]
    want = [*reverse, (0, 0, 0, 3, 0, 0, 7, 1)] if backward else forward
    assert [tuple(call[name] for name in scalars) for call in calls] == want
    same = [{name: value for name, value in call.items() if name not in scalars} for call in calls]
    assert all(one == same[0] for one in same)
    assert all(same[0][name] == name for name in tensors)
    assert (same[0]["B"], same[0]["N"], same[0]["H"], same[0]["D"]) == (3, 8, 66, 2)


@gpu
@pytest.mark.parametrize("H", [64, 256])
def test_captured_in_a_cuda_graph_without_a_synchronisation(chosen: None, H: int) -> None:
    module = fastgru.GRU(H, H, device=DEVICE, dtype=BRAIN).requires_grad_(False)
    x = torch.randn(6, 4, H, device=DEVICE, dtype=BRAIN)
    want = module(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again[0], want[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, module(x), strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("H", [64, 256])
def test_tf32_where_torch_allows_it(H: int) -> None:
    problem = GruProblem(H=H, I=64, T=20, B=32, device=DEVICE)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        with fastgru.use_backend("triton"):
            assert_parity(problem)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@gpu
def test_a_new_length_or_batch_does_not_compile_again(chosen: None) -> None:
    from fastgru.kernels.gru.forward import gru_forward_resident

    def compiled() -> int:
        return sum(len(caches[0]) for caches in gru_forward_resident.device_caches.values())

    module = fastgru.GRU(8, 8, device=DEVICE)
    module(torch.randn(5, 3, 8, device=DEVICE))
    before = compiled()
    for T, B in ((1, 3), (16, 16), (7, 33)):
        module(torch.randn(T, B, 8, device=DEVICE))
    assert compiled() == before


@gpu
@pytest.mark.parametrize(
    "problem",
    [
        GruProblem(T=130, B=70, I=128, H=512, dtype=BRAIN, bidirectional=True),
        GruProblem(T=60, B=300, I=64, H=1024, dtype=HALF),
        GruProblem(T=64, B=40, I=256, H=320, packed=True, bidirectional=True),
        GruProblem(T=600, B=64, I=32, H=128, dtype=BRAIN, packed=True),
    ],
    ids=str,
)
def test_parity_of_larger_problems(chosen: None, problem: GruProblem) -> None:
    assert_parity(GruProblem(**vars(problem) | {"device": DEVICE}))
