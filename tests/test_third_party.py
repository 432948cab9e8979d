"""Models of packages that are no dependency of this one: converted or patched, nothing changes but the time.

    pip install --no-deps --target DIR torch-geometric rsl-rl-lib torchrl tensordict asteroid asteroid-filterbanks \
        thop ptflops opacus openvino executorch
    PYTHONPATH=DIR pytest tests/test_third_party.py -rs    # says what else they import

A test whose package is absent is skipped.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgru

pytestmark = pytest.mark.filterwarnings("ignore")


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # What is missing is often not the package but something that it imports.
        pytest.skip(f"{name} cannot be imported: {error}")


def attentive_fp() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
    geometric = package("torch_geometric.nn")
    edges, nodes, features = torch.randint(20, (2, 60)), torch.randn(20, 7), torch.randn(60, 4)
    batch = torch.arange(20) // 5
    return lambda: geometric.AttentiveFP(7, 16, 3, 4, 2, 2, dropout=0.2), lambda m: m(nodes, edges, features, batch)


def gru_aggregation() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
    geometric = package("torch_geometric.nn")
    nodes, groups = torch.randn(20, 7), torch.arange(20) // 5
    return lambda: geometric.GRUAggregation(7, 8), lambda m: m(nodes, groups)


def dprnn() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
    recurrent = package("asteroid.masknn.recurrent")
    options = {"bn_chan": 8, "hid_size": 8, "chunk_size": 10, "n_repeats": 2, "rnn_type": "GRU", "use_mulcat": True}
    x = torch.randn(2, 8, 50)
    return lambda: recurrent.DPRNN(8, 2, **options), lambda m: m(x)


def recurrent_policy() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
    models, tensordict = package("rsl_rl.models"), package("tensordict")
    observations = tensordict.TensorDict({"policy": torch.randn(4, 5)}, batch_size=[4])

    def make() -> nn.Module:
        groups = {"actor": ["policy"]}
        model: nn.Module = models.RNNModel(observations, groups, "actor", 3, rnn_type="gru", rnn_hidden_dim=6)
        return model

    return make, lambda m: torch.stack([m(observations) for _ in range(3)])


def recurrent_module() -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
    modules, tensordict = package("torchrl.modules"), package("tensordict")
    data = {"o": torch.randn(3, 7, 5), "is_init": torch.rand(3, 7, 1) < 0.3, "h": torch.zeros(3, 7, 2, 6)}

    def make() -> nn.Module:
        keys = {"in_keys": ["o", "h", "is_init"], "out_keys": ["z", ("next", "h")]}
        module: nn.Module = modules.GRUModule(input_size=5, hidden_size=6, num_layers=2, **keys)
        return module

    def run(module: nn.Module) -> Tensor:
        with modules.set_recurrent_mode(True):
            output: Tensor = module(tensordict.TensorDict(data, batch_size=[3, 7]))["z"]
            return output

    return make, run


# The modules that convert swaps, those that patch reaches (the others are built by names taken from torch.nn before),
# and whether the package asks for isinstance(module, nn.GRU).
MODELS: dict[str, tuple[Callable[[], Any], int, int, bool]] = {
    "torch_geometric AttentiveFP": (attentive_fp, 3, 0, False),
    "torch_geometric GRUAggregation": (gru_aggregation, 1, 0, False),
    "asteroid DPRNN": (dprnn, 8, 8, False),
    "rsl_rl RNNModel": (recurrent_policy, 1, 1, False),
    "torchrl GRUModule": (recurrent_module, 1, 1, True),
}


def results(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Any]:
    torch.manual_seed(3)
    output = run(model)
    output.square().sum().backward()
    return [output.detach(), {name: p.grad for name, p in model.named_parameters()}]


def swapped(model: nn.Module) -> int:
    return sum(isinstance(module, (fastgru.GRU, fastgru.GRUCell)) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name: str) -> None:
    case, converted, patched, asks = MODELS[name]
    make, run = case()

    def build() -> nn.Module:
        torch.manual_seed(1)
        return make()

    want = results(build(), run)
    assert any(g is not None and g.any() for g in want[1].values())
    for keep_types in (True, *([] if asks else [False])):
        model = fastgru.convert(build(), keep_types=keep_types)
        assert swapped(model) == converted
        torch.testing.assert_close(results(model, run), want, rtol=1e-4, atol=1e-5)
    with fastgru.patch():
        model = build()
        assert swapped(model) == patched
        torch.testing.assert_close(results(model, run), want, rtol=1e-4, atol=1e-5)


def test_a_policy_is_exported_for_its_robot() -> None:
    make, run = recurrent_policy()
    model = make()
    want = run(model)[:1]
    exported: Any = fastgru.convert(model, keep_types=True)
    scripted = torch.jit.script(exported.as_jit())
    assert scripted(torch.randn(1, 5)).shape == (1, want.size(2))
    assert exported.as_onnx(False).rnn_type == "gru"


# Tools that look inside a model: what docs/tools.md says of them. -----------------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cell = nn.GRUCell(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        states, _ = self.attention(states, states, states, need_weights=False)
        result: Tensor = self.out(self.cell(states[:, -1]))
        return result


def taggers() -> tuple[Tagger, Tagger]:
    """torch's, and its copy on fastgru."""
    theirs = Tagger().eval()
    return theirs, fastgru.convert(copy.deepcopy(theirs))


X = torch.randn(3, 5, 8)


def decomposed(model: nn.Module) -> Any:
    table = torch.export.default_decompositions()
    table.update(fastgru.decompositions())
    return torch.export.export(model, (X,)).run_decompositions(table)


def test_executorch() -> None:
    exir, runtime = package("executorch.exir"), package("executorch.runtime")
    theirs, ours = taggers()
    with pytest.raises(RuntimeError, match="Missing out variants"):
        exir.to_edge(torch.export.export(ours, (X,))).to_executorch()
    buffer = exir.to_edge(decomposed(ours)).to_executorch().buffer
    method = runtime.Runtime.get().load_program(buffer).load_method("forward")
    torch.testing.assert_close(method.execute([X])[0], theirs(X))


def test_openvino() -> None:
    openvino = package("openvino")
    theirs, ours = taggers()
    compiled = openvino.Core().compile_model(openvino.convert_model(decomposed(ours)), "CPU")
    # It may compute in bfloat16.
    torch.testing.assert_close(torch.from_numpy(compiled(X.numpy())[0]), theirs(X), rtol=1e-2, atol=1e-2)


def test_thop() -> None:
    thop, hooks = package("thop"), package("thop.rnn_hooks")
    theirs, ours = taggers()
    want = thop.profile(theirs, (X,), verbose=False)
    rules = {fastgru.GRU: hooks.count_gru, fastgru.GRUCell: hooks.count_gru_cell}
    assert thop.profile(ours, (X,), custom_ops=rules, verbose=False) == want
    assert thop.profile(fastgru.revert(ours), (X,), verbose=False) == want


def test_ptflops() -> None:
    ptflops = package("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    theirs, ours = taggers()
    assert ptflops.get_model_complexity_info(fastgru.revert(ours), (5, 8), **options) == (
        ptflops.get_model_complexity_info(theirs, (5, 8), **options)
    )


def test_quantize_dynamic() -> None:
    quantization = package("torch.ao.quantization")
    _, ours = taggers()
    quantized = quantization.quantize_dynamic(fastgru.revert(ours), {nn.GRU, nn.GRUCell, nn.Linear})
    assert all("quantized" in type(m).__module__ for m in (quantized.gru, quantized.cell, quantized.out))
    assert quantized(X).shape == (3, 4)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.gru(x)[0][:, -1])
        return result


def test_opacus() -> None:
    opacus = package("opacus")

    model = fastgru.convert(Classifier())
    data = torch.utils.data.TensorDataset(torch.randn(12, 5, 8), torch.randint(4, (12,)))
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ew",
    )
    before = model.gru.weight_hh_l0.detach().clone()
    for x, labels in loader:
        if len(x):
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), labels).backward()
            optimizer.step()
    assert not torch.equal(before, model.gru.weight_hh_l0)
    fixed = opacus.validators.ModuleValidator.fix(fastgru.revert(Classifier()))
    assert type(fixed.gru).__name__ == "DPGRU"
