"""What programs lean on, feature by feature: the lines of docs/compatibility.md."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastgru
from tests import attention_peers
from tests.compatibility import ATTENTION, attention_cell, attention_line, features

RNN = Any


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def feature(section: str, name: str) -> pytest.MarkDecorator:
    return pytest.mark.feature(section, name)


def oracle(module: nn.Module) -> nn.Module:
    """torch's module on copies of the weights."""
    return fastgru.revert(copy.deepcopy(module))


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output, h_n = module(x)
    grads = torch.autograd.grad(output.sin().sum() + h_n.sum(), [x, *module.parameters()])
    return [output.detach(), h_n.detach(), *grads]


# Compilers and exporters. ---------------------------------------------------------------------------------------------

COMPILERS = "Compilers and exporters"


class Model(nn.Module):
    """A GRU of two layers and a cell."""

    def __init__(self, rnn: RNN, **options: Any) -> None:
        super().__init__()
        self.gru = rnn.GRU(3, 4, 2, **options)
        self.cell = rnn.GRUCell(4, 5)

    def forward(self, x: Tensor) -> Any:
        output, h_n = self.gru(x)
        return output, h_n, self.cell(h_n[0])


@feature(COMPILERS, "torch.compile(fullgraph=True), forward and backward")
def test_compile(rnn: RNN) -> None:
    module = rnn.GRU(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    want = gradients(oracle(module), x)
    assert_same(gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), x), want)


@feature(COMPILERS, 'torch.compile(fullgraph=True, mode="reduce-overhead"), new T and B without recompiling')
def test_compile_dynamic(rnn: RNN) -> None:
    model = Model(rnn)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, mode="reduce-overhead")
    for steps, batch in ((5, 2), (9, 4), (2, 7)):
        x = torch.randn(steps, batch, 3)
        assert_same(compiled(x), oracle(model)(x))
    assert counters["stats"]["unique_graphs"] == 1


@feature(COMPILERS, "torch.compile makes at most one dynamic graph of new T and B")
def test_compile_automatic_dynamic(rnn: RNN) -> None:
    model = Model(rnn)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for steps, batch in ((5, 2), (9, 4), (2, 7), (11, 3)):
        x = torch.randn(steps, batch, 3)
        assert_same(compiled(x), oracle(model)(x))
    assert counters["stats"]["unique_graphs"] == 2


@feature(
    COMPILERS, "torch.compile of a gradient, of per-sample gradients and of a directional derivative by torch.func"
)
def test_compile_of_transforms(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    weights = dict(module.named_parameters())

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, w, (x.unsqueeze(1),))[0].sin().sum()

    def function(w: dict[str, Tensor], x: Tensor) -> Any:
        derivative = jvp(lambda x: module(x)[0], (x,), (x.cos(),))
        return grad(loss)(w, x[:, 0]), vmap(grad(loss), in_dims=(None, 1))(w, x), derivative

    x = torch.randn(2, 2, 3)
    assert_same(torch.compile(function, fullgraph=True, backend="eager")(weights, x), function(weights, x))


DYNAMIC = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}


@feature(COMPILERS, "torch.export, strict and not, dynamic T and B, saved and loaded")
@pytest.mark.filterwarnings("ignore")  # The exporters' own.
@pytest.mark.parametrize("strict", [False, True])
def test_export(rnn: RNN, strict: bool) -> None:
    model = Model(rnn, batch_first=False)
    exported = torch.export.export(model, (torch.randn(5, 2, 3),), strict=strict, dynamic_shapes={"x": DYNAMIC})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    x = torch.randn(9, 4, 3)
    assert_same(torch.export.load(buffer).module()(x), oracle(model)(x))


@feature(COMPILERS, "AOTInductor, dynamic T and B")
@pytest.mark.filterwarnings("ignore")
def test_aot_inductor(rnn: RNN, tmp_path: Path) -> None:
    module = rnn.GRU(3, 4, 2, bidirectional=True)
    with torch.no_grad():
        exported = torch.export.export(module, (torch.randn(5, 2, 3),), dynamic_shapes={"input": DYNAMIC})
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for shape in ((5, 2, 3), (9, 4, 3), (1, 1, 3)):
        x = torch.randn(shape)
        assert_same(tuple(run(x)), oracle(module)(x))


@feature(COMPILERS, "torch.onnx.export to GRU nodes, the same numbers in ONNX Runtime")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"bias": False, "batch_first": True, "bidirectional": True}], ids=str
)
def test_onnx(rnn: RNN, options: dict[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Model(rnn, **options).eval()
    program = torch.onnx.export(
        model, (torch.randn(5, 2, 3),), dynamo=True, verbose=False, dynamic_shapes={"x": DYNAMIC}
    )
    path = str(tmp_path / "model.onnx")
    program.save(path)
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    nodes = [node for node in loaded.graph.node if node.op_type == "GRU"]
    assert len(nodes) >= 2  # The cell may be one, or be written out.
    for node in nodes:
        assert {a.name: a.i for a in node.attribute}["linear_before_reset"] == 1
    session = runtime.InferenceSession(path)
    for shape in ((5, 2, 3), (7, 4, 3)):
        x = torch.randn(shape)
        got = session.run(None, {"x": x.numpy()})
        assert_same([torch.from_numpy(array) for array in got], list(oracle(model)(x)))


@feature(COMPILERS, "torch.onnx.export(dynamo=False), the old exporter, to GRU nodes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_old_onnx(rnn: RNN, bidirectional: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    axes: Any = {"x": {0: "T", 1: "B"}}
    model = Model(rnn, bidirectional=bidirectional).eval()
    for each in (model.gru, model):  # by itself it is passed what its caller left out
        torch.onnx.export(each, (torch.randn(5, 2, 3),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "GRU"]
    assert len(nodes) == 2
    assert all({a.name: a.i for a in node.attribute}["linear_before_reset"] == 1 for node in nodes)
    x = torch.randn(7, 4, 3)
    got = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert_same([torch.from_numpy(array) for array in got], list(oracle(model)(x)))


@feature(COMPILERS, "fake and meta tensors, forward and backward")
def test_fake_and_meta(rnn: RNN) -> None:
    with torch._subclasses.FakeTensorMode():
        fake = Model(rnn)
        fake(torch.randn(5, 2, 3))[2].sum().backward()
        assert fake.gru.weight_hh_l1.grad.shape == (12, 4)
    meta = Model(rnn).to("meta")
    output, h_n, state = meta(torch.randn(5, 2, 3, device="meta"))
    assert (output.shape, h_n.shape, state.shape) == ((5, 2, 4), (2, 2, 4), (2, 5))
    state.sum().backward()
    assert meta.gru.weight_hh_l0.grad.is_meta


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@feature(COMPILERS, "torch.jit.trace, saved and loaded, with gradients")
def test_jit_trace(rnn: RNN) -> None:
    model = Model(rnn)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (torch.randn(5, 2, 3),)), buffer)
    buffer.seek(0)
    traced, want = torch.jit.load(buffer), oracle(model)
    x = torch.randn(9, 4, 3)
    results = []
    for module in (traced, want):
        result = module(x)
        results.append(
            [result, torch.autograd.grad(result[0].sum(), dict(module.named_parameters())["gru.weight_hh_l1"])]
        )
    assert_same(*results)


class Packed(nn.Module):
    """Padded input and lengths to padded output."""

    def __init__(self, gru: nn.Module) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.gru(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@feature(COMPILERS, "torch.jit.trace of packed sequences, for new lengths and batches")
def test_jit_trace_packed(rnn: RNN) -> None:
    model = Packed(rnn.GRU(3, 4, 2))
    traced = torch.jit.trace(model, (torch.randn(5, 2, 3), torch.tensor([3, 5])), check_trace=False)
    arguments = torch.randn(6, 3, 3), torch.tensor([2, 6, 4])
    assert_same(traced(*arguments), oracle(model)(*arguments))


@feature(COMPILERS, "torch.jit.script (of fastgru: torch.nn's modules, on the same weights)")
def test_jit_script(rnn: RNN) -> None:
    model = Model(rnn)
    x = torch.randn(5, 2, 3)
    want = oracle(model)(x)
    assert_same(torch.jit.script(model)(x), want)


@feature(COMPILERS, "torch.fx: symbolic_trace keeps the modules as leaves")
def test_fx(rnn: RNN) -> None:
    model = Model(rnn)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["gru", "cell"]
    x = torch.randn(5, 2, 3)
    assert_same(traced(x), oracle(model)(x))


# Derivatives. ---------------------------------------------------------------------------------------------------------

AUTOGRAD = "Derivatives"


def double(rnn: RNN, *args: Any, **options: Any) -> Any:
    return rnn.GRU(*args, dtype=torch.float64, **options)


X = torch.randn(4, 2, 3, dtype=torch.float64)


@feature(AUTOGRAD, "gradcheck and gradgradcheck of weights, input and state")
def test_gradgradcheck(rnn: RNN) -> None:
    module = double(rnn, 3, 2, 2, bidirectional=True)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, hx: Tensor, *weights: Tensor) -> Any:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x, hx))

    leaves = [X, torch.randn(4, 2, 2, dtype=torch.float64), *module.parameters()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@feature(AUTOGRAD, "backward in eval() mode")
def test_backward_in_eval_mode(rnn: RNN) -> None:
    module = double(rnn, 3, 4, 2, dropout=0.5).eval()
    assert_same(gradients(module, X), gradients(oracle(module), X))


@feature(AUTOGRAD, "backward through sliced outputs, for any hidden size")
@pytest.mark.parametrize("hidden", [1, 2, 3, 5, 7, 30, 33])
def test_sliced_outputs(rnn: RNN, hidden: int) -> None:
    module = double(rnn, 3, hidden, bidirectional=True)
    results = []
    for run in (module, oracle(module)):
        x = X.clone().requires_grad_()
        output, h_n = run(x)
        loss = output[-1, :, 1:].sin().sum() + output[::2, 1].sum() + h_n[1, :, :1].sum()
        results.append(torch.autograd.grad(loss, [x, *run.parameters()]))
    assert_same(*results)


@feature(AUTOGRAD, "retain_graph, five times")
def test_retain_graph(rnn: RNN) -> None:
    module = double(rnn, 3, 4, 2)
    loss = module(X)[0].sin().sum()
    want = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    for _ in range(4):
        assert all(map(torch.equal, torch.autograd.grad(loss, list(module.parameters()), retain_graph=True), want))


@feature(AUTOGRAD, "activation checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(rnn: RNN, use_reentrant: bool) -> None:
    module = double(rnn, 3, 4, 2, dropout=0.5)
    grads = []
    for checkpointed in (False, True):
        module.zero_grad()
        torch.manual_seed(3)
        x = X.clone().requires_grad_()
        if checkpointed:
            output, _ = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=use_reentrant)
        else:
            output, _ = module(x)
        output.sin().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in module.parameters())])
    assert_same(*grads)


@feature(AUTOGRAD, "anomaly mode")
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode(rnn: RNN) -> None:
    module = double(rnn, 3, 4)
    with torch.autograd.detect_anomaly():
        assert_same(gradients(module, X), gradients(oracle(module), X))
        output, _ = module(X)
        with pytest.raises(RuntimeError, match="returned nan values"):
            (output.sum() * float("nan")).backward()


@feature(AUTOGRAD, "saved-tensor hooks: what backward keeps passes through them")
def test_saved_tensor_hooks(rnn: RNN) -> None:
    module = double(rnn, 3, 4, 2)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = gradients(module, X)
    assert len(packed) > 8
    assert_same(got, gradients(oracle(module), X))


@feature(AUTOGRAD, "torch.func: grad, jacrev, functional_call")
def test_torch_func(rnn: RNN) -> None:
    module = double(rnn, 3, 4)
    weights = {name: torch.randn_like(p) for name, p in module.named_parameters()}

    def results(run: nn.Module) -> Any:
        loss = lambda w, x: functional_call(run, w, (x,))[0].sin().sum()  # noqa: E731
        return grad(loss)(weights, X), jacrev(lambda x: run(x)[0].sum(0))(X)

    assert_same(results(module), results(oracle(module)))


@feature(AUTOGRAD, "torch.func: vmap, per-sample gradients")
def test_per_sample_gradients(rnn: RNN) -> None:
    module = double(rnn, 3, 4)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, w, (x.unsqueeze(1),))[0].sin().sum()

    got = vmap(grad(loss), in_dims=(None, 1))(weights, X)
    want = oracle(module)
    for sample in range(X.size(1)):
        want.zero_grad()
        want(X[:, sample : sample + 1])[0].sin().sum().backward()
        assert_same({name: g[sample] for name, g in got.items()}, {name: p.grad for name, p in want.named_parameters()})


@feature(AUTOGRAD, "torch.func: an ensemble, by stack_module_state and vmap")
def test_ensemble(rnn: RNN) -> None:
    members: list[Any] = [double(rnn, 3, 4, 2) for _ in range(3)]
    skeleton = copy.deepcopy(members[0]).to("meta")
    got = vmap(lambda *state: functional_call(skeleton, state, (X,))[0])(*stack_module_state(members))
    assert_same(got, torch.stack([oracle(member)(X)[0] for member in members]))


@feature(AUTOGRAD, "many gradients at once: is_grads_batched, jacobian(vectorize=True) in both modes")
def test_batched_gradients(rnn: RNN) -> None:
    module = double(rnn, 3, 4)
    want = torch.autograd.functional.jacobian(lambda x: oracle(module)(x)[0], X)
    for strategy in ("reverse-mode", "forward-mode"):
        jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], X, vectorize=True, strategy=strategy)
        assert_same(jacobian, want)
    leaf = X.clone().requires_grad_()
    output, _ = module(leaf)
    seeds = torch.eye(output.numel(), dtype=X.dtype).view(-1, *output.shape)
    (rows,) = torch.autograd.grad(output, leaf, seeds, is_grads_batched=True)
    assert_same(rows.view_as(want), want)


@feature(AUTOGRAD, "forward-mode differentiation")
def test_forward_mode(rnn: RNN) -> None:
    module = double(rnn, 3, 4)
    tangent = torch.randn_like(X)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(module(forward_ad.make_dual(X, tangent))[0]).tangent
    step = 1e-6
    want = (module(X + step * tangent)[0] - module(X - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@feature(AUTOGRAD, "a weight overwritten between forward and backward raises")
def test_overwritten_weight(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    output, _ = module(torch.randn(4, 2, 3, requires_grad=True))
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Precision. -----------------------------------------------------------------------------------------------------------

PRECISION = "Precision"
HALF = [torch.bfloat16, torch.float16]


@feature(PRECISION, "autocast of modules and cells, forward and backward")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(rnn: RNN, dtype: torch.dtype) -> None:
    model = Model(rnn)
    x = torch.randn(5, 2, 3)
    want = oracle(model)
    with torch.autocast("cpu", dtype):
        got, theirs = model(x), want(x)
    exact = want(x)
    for a, b, c in zip(got, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), c, rtol=0, atol=8 * torch.finfo(dtype).eps)
    got[2].sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.gru.weight_hh_l0.grad is not None


@feature(PRECISION, "GradScaler: a step that overflows is skipped")
def test_grad_scaler(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(5, 2, 3)
    before = module.weight_hh_l0.detach().clone()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x)[0].float().sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(module.weight_hh_l0, before) == (factor != 1.0)
    assert scaler.get_scale() == 2.0**9


@feature(PRECISION, "modules in bfloat16 and float16, trained")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_modules(rnn: RNN, dtype: torch.dtype) -> None:
    module = rnn.GRU(3, 4, 2).to(dtype)
    x = torch.randn(5, 2, 3).to(dtype)
    got, want = gradients(module, x), gradients(oracle(module).double(), x.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=16 * torch.finfo(dtype).eps * max(1.0, b.abs().max().item())
        )


@feature(PRECISION, "complex modules, with first and second derivatives")
@pytest.mark.filterwarnings("ignore:fastgru runs torch.complex128")
def test_complex(rnn: RNN) -> None:
    module = rnn.GRU(3, 4, 2, bidirectional=True, dtype=torch.complex128)
    x = torch.randn(5, 2, 3, dtype=torch.complex128, requires_grad=True)
    results = []
    for run in (module, oracle(module)):
        output, h_n = run(x)
        loss = output.sin().sum().real + h_n.sum().imag
        results.append([output, h_n, torch.autograd.grad(loss, [x, *run.parameters()])])
    assert_same(*results)
    assert gradgradcheck(lambda x: module(x), x, fast_mode=True)


@feature(PRECISION, "torch.set_float32_matmul_precision: never less exact than it allows")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision(rnn: RNN, precision: str) -> None:
    module = rnn.GRU(64, 64)
    x = torch.randn(5, 2, 64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got, _ = module(x)
    finally:
        torch.set_float32_matmul_precision(before)
    want, _ = oracle(module).double()(x.double())
    atol = {"highest": 1e-6, "high": 1e-3, "medium": 2e-2}[precision]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


# Modules. -------------------------------------------------------------------------------------------------------------

MODULES = "Modules"
INPUT = torch.randn(4, 2, 3)


@feature(MODULES, "deepcopy, pickle, torch.save and torch.load of the module")
def test_copies(rnn: RNN) -> None:
    model = Model(rnn)
    buffer = io.BytesIO()
    torch.save(model.gru, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model.gru),
        pickle.loads(pickle.dumps(model.gru)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is rnn.GRU
        assert_same(copied(INPUT), oracle(model.gru)(INPUT))
    assert_same(
        pickle.loads(pickle.dumps(model.cell))(INPUT[0, :, :1].expand(-1, 4)), model.cell(INPUT[0, :, :1].expand(-1, 4))
    )


@feature(MODULES, "torch.load(weights_only=True) of a state_dict, load_state_dict with and without assign=True")
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(rnn: RNN, assign: bool) -> None:
    source, target = rnn.GRU(3, 4, 2), rnn.GRU(3, 4, 2)
    target(INPUT)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert_same(target(INPUT), oracle(source)(INPUT))


@feature(MODULES, "torch.__future__.set_swap_module_params_on_conversion(True): to() and load_state_dict()")
def test_swapped_parameters(rnn: RNN) -> None:
    module, source = pickle.loads(pickle.dumps(rnn.GRU(3, 4, 2))), rnn.GRU(3, 4, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double().load_state_dict(source.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(module(INPUT.double()), oracle(source).double()(INPUT.double()))


@feature(MODULES, "torch.nn.utils.skip_init")
def test_skip_init(rnn: RNN) -> None:
    module, empty = rnn.GRU(3, 4), nn.utils.skip_init(rnn.GRU, 3, 4)
    empty.load_state_dict(module.state_dict())
    assert_same(empty(INPUT), oracle(module)(INPUT))


@feature(MODULES, "to(), to_empty(), and a module made on the meta device")
def test_devices(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    assert_same(module.to(torch.float64)(INPUT.double()), oracle(module)(INPUT.double()))
    for empty in (
        rnn.GRU(3, 4, device="meta").to_empty(device="cpu"),
        rnn.GRU(3, 4).to("meta").to_empty(device="cpu"),
    ):
        empty.load_state_dict(module.state_dict())
        assert_same(empty(INPUT), oracle(module).float()(INPUT))
    with torch.device("meta"):
        assert rnn.GRU(3, 4).weight_hh_l0.is_meta


REPARAMETRIZED: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "hooks' weight_norm": weight_norm,
    "hooks' spectral_norm": spectral_norm,
    "pruning": lambda module, name: prune.l1_unstructured(module, name, amount=0.5),
}


@feature(MODULES, "parametrizations, weight_norm, spectral_norm and pruning train as an explicit weight would")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized(rnn: RNN, name: str) -> None:
    module = double(rnn, 3, 4)
    REPARAMETRIZED[name](module, "weight_hh_l0")
    module.eval()  # spectral_norm iterates at each call in training
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        output, _ = module(X)
        plain = nn.GRU(3, 4, dtype=torch.float64)
        explicit = {key: getattr(module, key).detach().clone() for key, _ in plain.named_parameters()}
        assert_same(output, functional_call(plain, explicit, (X,))[0])
        optimizer.zero_grad()
        output.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
        before = output.detach()
        optimizer.step()
        assert not torch.equal(module(X)[0], before)


@feature(MODULES, "a parametrized module is copied after a forward pass")
def test_copy_of_parametrized(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    parametrizations.weight_norm(module, "weight_hh_l0")
    want = module(INPUT)
    assert_same(copy.deepcopy(module)(INPUT), want)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is rnn.GRU
    assert_same(module(INPUT), want)


@feature(MODULES, "weights tied inside a module and shared between modules")
def test_tied_weights(rnn: RNN) -> None:
    modules = [rnn.GRU(3, 3, 2), rnn.GRU(3, 3)]
    modules[0].weight_hh_l1 = modules[0].weight_hh_l0
    modules[1].weight_hh_l0 = modules[0].weight_hh_l0
    chain = nn.ModuleList(modules)
    want = copy.deepcopy(chain)
    fastgru.revert(want)
    assert len(list(chain.parameters())) == 10

    def run(chain: nn.ModuleList) -> list[Any]:
        x = INPUT
        for module in chain:
            x, _ = module(x)
        return [x, torch.autograd.grad(x.sin().sum(), list(chain.parameters()))]

    assert_same(run(chain), run(want))
    chain.double()
    assert chain[1].weight_hh_l0 is chain[0].weight_hh_l1 is chain[0].weight_hh_l0


@feature(MODULES, "hooks: forward, backward, state_dict")
def test_hooks(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_state_dict_post_hook(lambda m, state, *_: state.update(extra=torch.ones(1)))
    module.register_load_state_dict_pre_hook(lambda m, state, *_: state.pop("extra"))
    module(INPUT.clone().requires_grad_())[0].sum().backward()
    assert calls == ["pre", "forward", "backward"]
    state = module.state_dict()
    assert "extra" in state
    module.load_state_dict(state)


@feature(MODULES, "flatten_parameters() called by others changes nothing; no warning about chunks of memory")
def test_flatten_parameters(rnn: RNN) -> None:
    module = rnn.GRU(3, 4, 2)
    want = module(INPUT)
    replica = copy.copy(module)
    for each in (module, replica):
        each.flatten_parameters()
        assert_same(each(INPUT), want)


# Sequences. -----------------------------------------------------------------------------------------------------------

SEQUENCES = "Sequences"
LENGTHS = [2, 5, 3]


def padded_and_oracle(rnn: RNN) -> tuple[Any, Tensor, Any]:
    """A module, padded input [T, B, I], and what packing gives: padded output and h_n."""
    module = rnn.GRU(3, 4, 2, bidirectional=True)
    sequences = [torch.randn(n, 3) for n in LENGTHS]
    output, h_n = oracle(module)(pack_sequence(sequences, enforce_sorted=False))
    return module, nn.utils.rnn.pad_sequence(sequences), (pad_packed_sequence(output)[0], h_n)


@feature(SEQUENCES, "packed sequences, in any order")
def test_packed(rnn: RNN) -> None:
    module, x, want = padded_and_oracle(rnn)
    packed = pack_sequence([x[:n, b] for b, n in enumerate(LENGTHS)], enforce_sorted=False)
    output, h_n = module(packed)
    assert isinstance(output, PackedSequence)
    assert_same((pad_packed_sequence(output)[0], h_n), want)


@feature(SEQUENCES, "`lengths=` with padded input")
def test_lengths(rnn: RNN) -> None:
    module, x, want = padded_and_oracle(rnn)
    assert_same(module(x, lengths=torch.tensor(LENGTHS)), want)


@feature(SEQUENCES, "jagged nested tensors")
def test_jagged(rnn: RNN) -> None:
    module, x, (padded, want_h_n) = padded_and_oracle(rnn)
    nested = torch.nested.nested_tensor([x[:n, b] for b, n in enumerate(LENGTHS)], layout=torch.jagged)
    output, h_n = module(nested)
    assert_same(list(output.unbind()), [padded[:n, b] for b, n in enumerate(LENGTHS)])
    assert_same(h_n, want_h_n)


@feature(SEQUENCES, "resets inside a sequence (`reset_mask=`)")
def test_resets(rnn: RNN) -> None:
    module = rnn.GRU(3, 4, 2)
    x = torch.randn(6, 1, 3)
    mask = torch.zeros(6, 1, dtype=torch.bool)
    mask[2] = True
    output, h_n = module(x, reset_mask=mask)
    plain = oracle(module)
    assert_same(output, torch.cat([plain(x[:2])[0], plain(x[2:])[0]]))
    assert_same(h_n, plain(x[2:])[1])


@feature(SEQUENCES, "an empty batch, with gradients")
def test_empty_batch(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    output, h_n = module(torch.randn(4, 0, 3))
    assert (output.shape, h_n.shape) == ((4, 0, 4), (1, 0, 4))
    output.sum().backward()
    assert not module.weight_hh_l0.grad.any()


# Dropout. -------------------------------------------------------------------------------------------------------------

DROPOUT = "Dropout between layers"


@feature(DROPOUT, "seeded runs repeat, calls differ, eval() has none, torch's generator moves")
def test_dropout(rnn: RNN) -> None:
    module = rnn.GRU(3, 32, 3, dropout=0.5)
    torch.manual_seed(1)
    first, second = module(INPUT)[0], module(INPUT)[0]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(module(INPUT)[0], first)
    assert torch.equal(module(INPUT)[0], second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(INPUT)[0], module(INPUT)[0])


@feature(DROPOUT, "the share of zeros is the probability; what is left is scaled")
def test_dropout_rate(rnn: RNN) -> None:
    # The second layer's candidate is a copy of its input, so its output shows the mask.
    module = rnn.GRU(1, 64, 2, dropout=0.25)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[128:] = 0.1
        module.weight_ih_l1[128:] = torch.eye(64)
    output, _ = module(torch.zeros(1, 256, 1))
    # Unmasked: n = tanh(0.1), h = n / 2; then n = tanh(h / 0.75), h = n / 2.
    kept = (torch.tanh(torch.tanh(torch.tensor(0.1)) / 2 / 0.75) / 2).item()
    zeros = output == 0
    torch.testing.assert_close(output[~zeros], torch.full_like(output[~zeros], kept))
    # Ten standard deviations of the mean of 16384 draws.
    assert abs(zeros.double().mean().item() - 0.25) < 10 * (0.25 * 0.75 / zeros.numel()) ** 0.5


# Small print. ---------------------------------------------------------------------------------------------------------

SMALL_PRINT = "Small print"


@feature(SMALL_PRINT, "forward(input=..., hx=...) by keyword")
def test_keywords(rnn: RNN) -> None:
    module, cell = rnn.GRU(3, 4), rnn.GRUCell(3, 4)
    hx = torch.randn(1, 2, 4)
    assert_same(module(input=INPUT, hx=hx), oracle(module)(INPUT, hx))
    assert_same(cell(input=INPUT[0], hx=hx[0]), oracle(cell)(INPUT[0], hx[0]))


@feature(SMALL_PRINT, "subclassed, also beside a second base")
def test_subclass(rnn: RNN) -> None:
    class Mixin:
        def describe(self) -> str:
            return "beside"

    class Mine(rnn.GRU, Mixin):  # type: ignore[misc]
        def __init__(self, size: int, *, scale: float) -> None:
            super().__init__(size, 4)
            self.scale = scale

        def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
            output, h_n = super().forward(input, hx)
            return self.scale * output, h_n

    module = Mine(3, scale=2.0)
    assert module.describe() == "beside"
    plain = nn.GRU(3, 4)
    plain.load_state_dict(module.state_dict())
    assert_same(module(INPUT)[0], 2 * plain(INPUT)[0])


@feature(SMALL_PRINT, "a docstring, nn.GRU's class attributes, attributes and parameter names")
def test_attributes(rnn: RNN) -> None:
    for ours, theirs in ((rnn.GRU, nn.GRU), (rnn.GRUCell, nn.GRUCell)):
        assert inspect.getdoc(ours)
        assert ours.__doc__ != inspect.getdoc(ours.__mro__[1])
        assert ours.__constants__ == theirs.__constants__
        assert {name for name in dir(theirs) if not name.startswith("_")} <= set(dir(ours))
        module, plain = ours(3, 4), theirs(3, 4)
        for name in theirs.__constants__:
            assert getattr(module, name) == getattr(plain, name)
        assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert rnn.GRU(3, 4).mode == "GRU"


@feature(SMALL_PRINT, "`p.data = ...`, re-set Parameters and in-place updates take effect at the next call")
def test_changed_weights(rnn: RNN) -> None:
    module = rnn.GRU(3, 4)
    module(INPUT)
    module.weight_hh_l0.data = torch.randn(12, 4)
    assert_same(module(INPUT), oracle(module)(INPUT))
    module.weight_ih_l0 = nn.Parameter(torch.randn(12, 3))
    assert_same(module(INPUT), oracle(module)(INPUT))
    with torch.no_grad():
        module.bias_hh_l0.add_(1)
    assert_same(module(INPUT), oracle(module)(INPUT))


@feature(SMALL_PRINT, "output strides, batch_first or not")
@pytest.mark.parametrize("batch_first", [False, True])
def test_strides(rnn: RNN, batch_first: bool) -> None:
    module = rnn.GRU(3, 4, batch_first=batch_first, bidirectional=True)
    got, want = module(INPUT), nn.GRU(3, 4, batch_first=batch_first, bidirectional=True)(INPUT)
    assert [t.stride() for t in got] == [t.stride() for t in want]


DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_in_the_docs_has_every_feature(request: pytest.FixtureRequest) -> None:
    table = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    for item in request.session.items:
        for section, name, _, _ in features(item):
            if section != ATTENTION:
                assert f"## {section}\n" in table, "run make compat"
                assert f"| {name} |" in table, "run make compat"
    assert not [line for line in table.splitlines() if line.startswith("| ") and line.split("|")[3].startswith(" no")]


def test_the_attention_table_in_the_docs_is_what_the_tests_say(request: pytest.FixtureRequest) -> None:
    page = (DOCS / "attention-features.md").read_text(encoding="utf-8")
    assert page.endswith("\n" + attention_peers.SOURCES), "run make compat"
    assert f"| | fastgru | {' | '.join(attention_peers.PEERS)} |" in page
    tested: dict[str, dict[str, list[str]]] = {name: {} for name in attention_peers.CELLS}
    for item in request.session.items:
        for section, name, detail, _ in features(item):
            if section == ATTENTION:
                tested[name].setdefault(detail, []).append("yes")
    files = {item.path.name for item in request.session.items}
    if not {"test_attention.py", "test_attention_parity.py"} <= files or request.config.option.keyword:
        pytest.skip("the tests of attention are not in this run")
    for name, cells in attention_peers.CELLS.items():
        assert tested[name], f"no test is marked feature({ATTENTION!r}, {name!r})"
        assert attention_line(name, attention_cell(tested[name]), cells) in page, "run make compat"
