"""fastgru.convert, revert, patch and the report, on models as people write them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import fastgru
from fastgru import testing
from fastgru.nn.convert import Converted
from fastgru.nn.gru import TorchGRU


class Overridden(nn.GRU):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        output, h_n = super().forward(input, hx)
        return output + 1, h_n


class OverriddenCheck(nn.GRU):
    def check_hidden_size(self, hx: Tensor, expected_hidden_size: Any, msg: str = "") -> None:
        raise RuntimeError("mine")


class Base:
    def describe(self) -> str:
        return "beside"


class Beside(nn.GRU, Base):
    """Another constructor, methods with super(), a second base."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, 2)
        self.scale = 3.0

    def extra_repr(self) -> str:
        return "mine, " + super().extra_repr()


class CellBeside(nn.GRUCell, Base):
    pass


class Registered:
    """Keeps a register of its subclasses, each under a key that it has to give."""

    register: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        Registered.register[key] = cls


class BesideRegistered(nn.GRU, Registered, key="mine"):
    pass


class OwnForward(fastgru.GRU):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, 2, bidirectional=True, dropout=0.5)
        self.cell = nn.GRUCell(12, 12)
        self.layers = nn.ModuleList([nn.GRU(12, 12), nn.GRU(12, 12, bias=False)])
        self.again = self.layers[0]
        self.linear = nn.Linear(12, 3)
        self.layers[1].weight_hh_l0 = self.layers[0].weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        for layer in (*self.layers, self.again):
            x, _ = layer(x)
        return self.linear(self.cell(x[-1]))


def outputs_and_grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    result = model(x)
    result = result[0] if isinstance(result, tuple) else result
    result.square().sum().backward()
    return [result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_model_computes_the_same_and_keeps_everything(backend: str) -> None:
    model = Model()
    model.layers.eval()
    model.cell.register_buffer("extra", torch.ones(2))
    calls: list[str] = []
    model.rnn.register_forward_hook(lambda *_: calls.append("forward"))
    model.rnn.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 5, requires_grad=True)
    want = outputs_and_grads(model, x)
    before = {name: value for name, value in model.state_dict(keep_vars=True).items()}
    modules, representation = list(model.modules()), repr(model)

    assert fastgru.convert(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert repr(model) == representation
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model.again is model.layers[0]
    assert model.layers[1].weight_hh_l0 is model.layers[0].weight_hh_l0
    assert [m.training for m in (model.rnn, model.layers[0])] == [True, False]
    assert type(model.rnn) is type(model.again) is fastgru.GRU
    assert type(model.cell) is fastgru.GRUCell
    assert not isinstance(model.rnn, nn.GRU)

    calls.clear()
    torch.testing.assert_close(outputs_and_grads(model, x), want)
    assert calls == ["forward", "backward"]
    optimizer.step()
    assert not torch.equal(outputs_and_grads(model, x)[0], want[0])


def test_revert_undoes_it() -> None:
    model = Model()
    x = torch.randn(4, 3, 5)
    want = outputs_and_grads(model, x)
    kinds = [type(m) for m in model.modules()]
    fastgru.revert(fastgru.convert(model))
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_grads(model, x), want, strict=True))


def test_revert_makes_torch_modules_of_those_built_as_ours() -> None:
    ours = fastgru.GRU(5, 6, 2, save_gates=False)
    x = torch.randn(4, 3, 5)
    want = ours(x)[0].detach()
    ours.weight_hh_l1 = nn.Parameter(ours.weight_hh_l1.detach() * 2)
    twice = ours(x)[0].detach()
    assert not torch.allclose(want, twice)
    theirs = fastgru.revert(ours)
    assert type(theirs) is nn.GRU
    torch.testing.assert_close(theirs(x)[0], twice)


def test_the_model_itself(backend: str) -> None:
    module = nn.GRU(5, 6)
    x = torch.randn(4, 3, 5)
    want = module(x)
    torch.testing.assert_close(fastgru.convert(module)(x), want)
    assert type(module) is fastgru.GRU


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keeps_dtype_and_device(dtype: torch.dtype, device: str) -> None:
    model = fastgru.convert(nn.Sequential(nn.GRU(5, 6, dtype=dtype, device=device)))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, device)}
    output, _ = model(torch.randn(4, 3, 5, dtype=dtype, device=device))
    assert (output.dtype, output.device.type) == (dtype, device)


REPARAMETRIZED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_ih_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0").eval(),
    "spectral_norm of old": lambda m: spectral_norm(m, "weight_hh_l0").eval(),
    "pruning": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
    "two": lambda m: parametrizations.weight_norm(parametrizations.weight_norm(m, "weight_ih_l0"), "weight_hh_l0"),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized_modules(backend: str, name: str) -> None:
    module = nn.GRU(5, 6, dtype=torch.float64)
    REPARAMETRIZED[name](module)
    # What the hooks of old leave behind cannot be copied, in any module; what is parametrized shares its class.
    copies = parametrize.is_parametrized(module)
    twin = copy.deepcopy(module) if copies else None
    kind = type(module)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    want = outputs_and_grads(module, x)
    fastgru.convert(module)
    assert isinstance(module, fastgru.GRU)
    assert not isinstance(module, nn.GRU)
    torch.testing.assert_close(outputs_and_grads(module, x), want)
    if copies:
        assert type(twin) is kind
        torch.testing.assert_close(outputs_and_grads(copy.deepcopy(module), x), want)
    fastgru.revert(module)
    assert isinstance(module, nn.GRU)
    torch.testing.assert_close(outputs_and_grads(module, x), want)


def test_parametrizations_can_be_removed_afterwards() -> None:
    module = fastgru.convert(parametrizations.weight_norm(nn.GRU(5, 6), "weight_hh_l0"))
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fastgru.GRU


@pytest.mark.parametrize("make", [lambda: Beside(5), lambda: CellBeside(5, 5)], ids=["GRU", "GRUCell"])
def test_subclasses_keep_what_is_theirs(backend: str, make: Callable[[], Any]) -> None:
    module = make()
    kind, representation = type(module), repr(module)
    x = torch.randn(4, 3, 5) if isinstance(module, nn.GRU) else torch.randn(3, 5)
    want = outputs_and_grads(module, x)
    fastgru.convert(module)
    assert isinstance(module, (fastgru.GRU, fastgru.GRUCell))
    assert isinstance(module, kind)
    assert module.describe() == "beside"
    assert repr(module) == representation
    torch.testing.assert_close(outputs_and_grads(module, x), want)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        torch.testing.assert_close(outputs_and_grads(copied, x), want)
        assert type(fastgru.revert(copied)) is kind
    fastgru.revert(module)
    assert type(module) is kind


def test_a_base_that_hears_of_its_subclasses_does_not_hear_of_ours() -> None:
    module, x = BesideRegistered(5, 6), torch.randn(4, 3, 5)
    want = module(x)
    torch.testing.assert_close(fastgru.convert(module)(x), want)
    assert isinstance(module, fastgru.GRU)
    assert Registered.register == {"mine": BesideRegistered}


def test_hooks_of_every_kind_go_on() -> None:
    calls: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    def hooked(module: nn.GRU) -> None:
        module.register_forward_pre_hook(hook("pre"))
        module.register_forward_pre_hook(hook("pre, keywords"), with_kwargs=True)
        module.register_forward_hook(hook("forward"))
        module.register_forward_hook(hook("forward, keywords"), with_kwargs=True, always_call=True)
        module.register_full_backward_pre_hook(hook("backward pre"))
        module.register_full_backward_hook(hook("backward"))
        module.register_state_dict_pre_hook(hook("state_dict pre"))
        module.register_state_dict_post_hook(hook("state_dict"))
        module.register_load_state_dict_pre_hook(hook("load pre"))
        module.register_load_state_dict_post_hook(hook("load"))
        module.weight_hh_l0.register_hook(hook("gradient"))
        module.weight_hh_l0.register_post_accumulate_grad_hook(hook("accumulated"))

    def use(module: nn.GRU) -> list[str]:
        calls.clear()
        output, _ = module(torch.randn(4, 3, 5, requires_grad=True), hx=torch.zeros(1, 3, 6))
        output.sum().backward()
        module.load_state_dict(module.state_dict())
        return sorted(calls)

    module = nn.GRU(5, 6)
    hooked(module)
    want = use(module)
    assert len(want) == len(set(want)) == 12
    assert use(fastgru.convert(module)) == want


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: parametrizations.weight_norm(m, "weight_hh_l0")])
def test_types_are_kept_for_code_that_asks(backend: str, wrap: Callable[[nn.GRU], nn.GRU]) -> None:
    model = nn.Sequential(wrap(nn.GRU(5, 6)))
    kind, x = type(model[0]), torch.randn(4, 3, 5)
    want = outputs_and_grads(model, x)
    assert fastgru.convert(model, keep_types=True) is model
    assert isinstance(model[0], nn.GRU)
    assert isinstance(model[0], fastgru.GRU)
    assert str(fastgru.conversion_report(model)) == f"0: {kind.__name__}: fastgru, backend {backend}"
    torch.testing.assert_close(outputs_and_grads(model, x), want)
    copied = copy.deepcopy(model)
    assert isinstance(copied[0], nn.GRU)
    torch.testing.assert_close(outputs_and_grads(copied, x), want)
    if kind is nn.GRU:
        torch.testing.assert_close(torch.compile(model, backend="eager")(x)[0], want[0])
        torch.testing.assert_close(torch.jit.script(pickle.loads(pickle.dumps(model)))(x)[0], want[0])
    fastgru.revert(model)
    assert not isinstance(model[0], fastgru.GRU)
    assert (type(model[0]) is nn.GRU) == (kind is nn.GRU)
    torch.testing.assert_close(outputs_and_grads(model, x), want)


def test_keeping_types_changes_nothing_for_what_keeps_them_anyway() -> None:
    assert type(fastgru.convert(nn.GRUCell(5, 6), keep_types=True)) is fastgru.GRUCell
    module = fastgru.convert(Beside(5), keep_types=True)
    assert isinstance(module, Beside)
    assert type(fastgru.revert(module)) is Beside


def test_a_subclass_runs_our_forward() -> None:
    module = fastgru.convert(Beside(5))
    x = torch.randn(4, 2, 5)
    output, _ = module(x, lengths=[2, 4])
    assert not output[2:, 0].any()


def replaced_on_the_instance() -> nn.GRU:
    module = nn.GRU(5, 6)
    original = module.forward
    module.forward = lambda *args: original(*args)  # type: ignore[method-assign]
    return module


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: Overridden(5, 6), "Overridden overrides forward"),
    "a method that forward calls": (lambda: OverriddenCheck(5, 6), "OverriddenCheck overrides check_hidden_size"),
    "forward of the instance": (replaced_on_the_instance, "its forward was replaced on the instance"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone_and_the_reason(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    module = make()
    kind = type(module)
    fastgru.convert(module)
    assert type(module) is kind
    (entry,) = fastgru.conversion_report(module).entries
    assert not entry.swapped
    assert entry.detail == f"left alone: {reason}"


def test_users_subclasses_of_ours_are_not_reverted() -> None:
    module = OwnForward(5, 6)
    assert type(fastgru.revert(module)) is OwnForward


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGRU_BACKEND", raising=False)
    model = nn.ModuleDict({"plain": nn.GRU(5, 6), "mine": Overridden(5, 6), "cell": nn.GRUCell(5, 6), "no": nn.ReLU()})
    assert [entry.detail for entry in fastgru.conversion_report(model).entries] == [
        "not converted yet",
        "left alone: Overridden overrides forward",
        "not converted yet",
    ]
    fastgru.convert(model)
    with fastgru.use_backend("reference"):
        assert str(fastgru.conversion_report(model)) == (
            "plain: GRU: fastgru, backend reference\n"
            "mine: Overridden: torch, left alone: Overridden overrides forward\n"
            "cell: GRUCell: fastgru, backend reference"
        )
    assert str(fastgru.conversion_report(nn.ReLU())) == "no nn.GRU, nn.GRUCell, nn.MultiheadAttention in this model"
    assert str(fastgru.conversion_report(nn.GRU(5, 6))) == "(the model itself): GRU: torch, not converted yet"


def test_report_tells_that_no_backend_can_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastgru.convert(nn.GRU(5, 6, device="meta"))
    monkeypatch.setenv("FASTGRU_BACKEND", "cpu")
    # The variable is read when a device is first used, which earlier tests may have done.
    fastgru.backends.registry.forget()
    (entry,) = fastgru.conversion_report(model).entries
    assert entry.detail.startswith("none: backend 'cpu' cannot run torch.float32 on meta")


def test_patch(backend: str) -> None:
    with fastgru.patch():
        module = nn.GRU(5, 6)
        cell = torch.nn.modules.GRUCell(5, 6)

        class Late(nn.GRU, Base):
            pass

        late = Late(5, 6)
        assert isinstance(module, nn.GRU)
        with fastgru.patch():  # within itself
            assert type(nn.GRU(5, 6)) is fastgru.GRU
        assert nn.GRU is fastgru.GRU
        assert type(fastgru.revert(fastgru.GRU(5, 6))) is TorchGRU
        pickle.dumps(TorchGRU(5, 6))
    assert nn.GRU is torch.nn.modules.GRU is TorchGRU
    assert type(module) is fastgru.GRU
    assert type(cell) is fastgru.GRUCell
    assert isinstance(late, fastgru.GRU)
    oracle = nn.GRU(5, 6)
    oracle.load_state_dict(late.state_dict())
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(late(x), oracle(x))
    assert late.describe() == "beside"


def test_patch_does_not_reach_the_oracle_of_the_numeric_rule() -> None:
    problem = testing.GruProblem()
    want = testing.parity(problem)
    with fastgru.patch():
        assert testing.parity(problem) == want
    assert any(comparison.error != comparison.torch_error for comparison in want)


def test_patch_ends_with_an_error() -> None:
    with pytest.raises(KeyError), fastgru.patch():
        raise KeyError
    assert nn.GRU is TorchGRU


def test_patch_as_a_decorator_and_torch_compile() -> None:
    @fastgru.patch()
    def build_and_run(x: Tensor) -> tuple[Any, Any]:
        module = nn.GRU(5, 6)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        return compiled(x), module(x)

    torch._dynamo.reset()
    torch.testing.assert_close(*build_and_run(torch.randn(4, 3, 5)))


class Slotted(nn.GRU):
    __slots__ = ("note",)


class Circular(nn.GRU):
    """Refers to itself, and has a say in its state."""

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.owner = [self]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.loaded = True


LINEAR = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
SAVED: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "GRU": (lambda: fastgru.GRU(5, 6), [fastgru.GRU]),
    "GRUCell": (lambda: fastgru.GRUCell(5, 6), [fastgru.GRUCell]),
    "MultiheadAttention": (lambda: fastgru.MultiheadAttention(4, 2), [fastgru.MultiheadAttention, LINEAR]),
    "convert": (lambda: fastgru.convert(nn.GRU(5, 6)), [fastgru.GRU]),
    "keep_types": (lambda: fastgru.convert(nn.GRU(5, 6), keep_types=True), [fastgru.GRU, nn.GRU, Converted]),
    "subclass": (lambda: fastgru.convert(Beside(5)), [fastgru.GRU, nn.GRU, Beside, Converted]),
    "circular": (lambda: fastgru.convert(Circular()), [fastgru.GRU, nn.GRU, Circular, Converted]),
    "slots": (lambda: fastgru.convert(Slotted(5, 6)), [fastgru.GRU, nn.GRU, Slotted, Converted]),
    "in a model": (
        lambda: nn.Sequential(fastgru.convert(nn.GRU(5, 6), keep_types=True)),
        [nn.Sequential, fastgru.GRU, nn.GRU, Converted],
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_whole_modules_are_loaded_and_copied(name: str) -> None:
    make, classes = SAVED[name]
    module = make()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    assert {f"{c.__module__}.{c.__qualname__}" for c in classes} == set(named)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    if name != "slots":  # which torch.load builds no instances of
        for left_out in classes:
            with torch.serialization.safe_globals([c for c in classes if c is not left_out]):
                with pytest.raises(pickle.UnpicklingError):
                    torch.load(buffer)
                buffer.seek(0)
        with torch.serialization.safe_globals(classes):
            copies.append(torch.load(buffer))
    for loaded in copies:
        assert [type(m) for m in loaded.modules()] == [type(m) for m in module.modules()]
        torch.testing.assert_close(loaded.state_dict(), module.state_dict())
        assert "_becomes" not in vars(loaded)
        if name == "circular":
            assert loaded.owner[0] is loaded and loaded.loaded
        if isinstance(loaded, fastgru.GRU):
            x = torch.randn(4, 2, 5)
            torch.testing.assert_close(loaded(x), module(x))
