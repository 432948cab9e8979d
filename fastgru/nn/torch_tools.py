"""Fits modules to torch.fx, torch.jit and the ONNX exporters, and checks settings that were edited after construction.

TorchScript cannot compile this package's modules: it gets torch's, on the same parameters.
"""

from __future__ import annotations

import inspect
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.rnn import PackedSequence


def _gru(
    self: nn.Module,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    device: Any = None,
    dtype: Any = None,
    *,
    save_gates: bool = True,
) -> None: ...


#: Of GRU's constructor, for those who ask what its arguments are called, as nn.utils.skip_init does.
gru_signature = inspect.signature(_gru)


def fx_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """One ``call_module`` node, as torch.fx makes of torch's own modules."""
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def recorded_zeros(module: nn.RNNBase, input: PackedSequence) -> Tensor:
    """The initial state of a packed batch, whose size is read from a tensor: a number would become part of what
    torch.jit.trace records."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    data, batch_sizes = input[:2]
    size: Any = (layers, batch_sizes[0], module.hidden_size)
    return torch.zeros(size, dtype=data.dtype, device=data.device)


def check_settings(module: nn.RNNBase) -> None:
    """Raises for what the constructor was given, edited since, of types that nn.GRU's operator refuses.

    Raises:
        TypeError: nn.GRU's.
    """
    for name in ("bias", "training", "bidirectional", "batch_first"):
        if not isinstance(getattr(module, name), bool):
            raise TypeError(f"{name} has to be of type bool, got {getattr(module, name)!r}")
    if not isinstance(module.num_layers, Integral) or isinstance(module.num_layers, bool):
        raise TypeError(f"num_layers has to be of type int, got {module.num_layers!r}")
    if not isinstance(module.dropout, (Real, Tensor)):
        raise TypeError(f"dropout has to be a number, got {module.dropout!r}")


def torch_twin(module: nn.Module, own: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """torch's module in the place of ours, on the same parameters.

    Raises:
        RuntimeError: ``module`` is of a class that was derived from ``own``.
    """
    # fastgru.convert notes there what it made the class from.
    if type(module) is not own and vars(type(module)).get("_fastgru_original") is not original:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(module).__name__}, which derives from fastgru.{own.__name__}: "
            "call fastgru.revert(model) first, or derive it from torch.nn's class"
        )
    twin = original.__new__(original)
    twin.__dict__ = {name: dict(value) if name == "_parameters" else value for name, value in vars(module).items()}
    if isinstance(twin, nn.RNNBase):
        twin._init_flat_weights()
    return twin


def _prepare_what_a_script_module_gets(parent: nn.Module, name: str, child: nn.Module | None) -> nn.Module | None:
    """torch.jit.script calls ``__prepare_scriptable__`` of all modules in a model, but a class derived from
    torch.jit.ScriptModule does not of those that its constructor is given."""
    if child is None or not isinstance(parent, torch.jit.ScriptModule) or isinstance(child, torch.jit.ScriptModule):
        return None
    for inner in list(child.modules()):
        for key, module in inner._modules.items():
            inner._modules[key] = _prepared(module)
    prepared: nn.Module = _prepared(child)
    return prepared


def _prepared(module: Any) -> Any:
    """torch's twin of a module of this package, and any other as it is."""
    ours = any(cls.__module__.startswith("fastgru.nn.") for cls in type(module).__mro__)
    return module.__prepare_scriptable__() if ours and hasattr(module, "__prepare_scriptable__") else module


register_module_module_registration_hook(_prepare_what_a_script_module_gets)  # type: ignore[arg-type]
