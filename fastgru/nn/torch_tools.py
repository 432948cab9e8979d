"""TorchScript, which cannot compile this package's modules: it gets torch's, on the same parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


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
