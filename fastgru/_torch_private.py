"""Looks up every private name of torch that this package reads, each with its use and what is done without it.

A version of torch without one of them loses what its comment says and no more. The names are looked up here, when the
package is imported, and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _find(name: str, instead: Any) -> Any:
    """What torch calls ``name``, or ``instead``."""
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        return instead


#: False only where no device has autocast on: the question that is asked before that for the device's own, which takes
#: longer. Without it that one is asked, and attention takes the general path.
is_any_autocast_enabled: Callable[[], bool] = _find("_C._is_any_autocast_enabled", lambda: True)

#: Whether torch.jit.trace is at work. Instead torch's public function, which calls it.
is_tracing: Callable[[], bool] = _find("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]

#: Whether torch.func is at work, whose transforms go through the composites in plain torch. Without it they reach the
#: operators, which vmap does not know.
are_functorch_transforms_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: False)

#: How many modes see every operator, as that of make_fx does. Without it make_fx does not record the operator that cuts
#: a batch by its lengths, and stops where they are read.
len_torch_dispatch_stack: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 0)

#: How many modes see every function of torch. Without it attention takes the general path, where they are asked.
len_torch_function_stack: Callable[[], int] = _find("_C._len_torch_function_stack", lambda: 1)

#: The module whose ``_current_level`` is not negative within forward-mode differentiation, which goes through the
#: composites. It has to be read when asked for. Without it the operators say that they have no such derivative.
forward_mode: Any = _find("autograd.forward_ad", None)
if not hasattr(forward_mode, "_current_level"):
    forward_mode = SimpleNamespace(_current_level=-1)

#: A context in which operators are called below autograd, whose way through Python is longer than a small problem.
#: Without it they take that way.
below_autograd: Callable[[], AbstractContextManager[Any]] = _find(
    "_C._AutoDispatchBelowAutograd", contextlib.nullcontext
)


def _recorded_within_operators() -> Callable[[], AbstractContextManager[Any]] | None:
    guard = _find("_C._SetExcludeDispatchKeyGuard", None)
    key = _find("_C.DispatchKey.AutogradFunctionality", None)
    return None if guard is None or key is None else functools.partial(guard, key, False)


#: A context in which autograd records within an operator's kernel, which is called with that switched off: cuDNN gives
#: gradients only to those who let torch record. Without it (None) the backend "cudnn" says that it cannot run.
recorded_within_operators: Callable[[], AbstractContextManager[Any]] | None = _recorded_within_operators()

# Each false in plain eager mode. What is on below torch's operators has to see operators.
_MODES = (
    "_C._is_any_autocast_enabled",
    "_C._is_tracing",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._are_functorch_transforms_active",
    "_C._autograd._profiler_enabled",
)


def modes() -> tuple[Callable[[], Any], ...] | str:
    """Functions of which each is false in plain eager mode, or why not all of them can be asked: then no call may go
    without torch's dispatcher."""
    functions = {name: _find(name, None) for name in _MODES}
    missing = [f"torch.{name}" for name, function in functions.items() if function is None]
    return f"this torch has no {', '.join(missing)}" if missing else tuple(functions.values())


#: What lets others read a tensor as DLPack without a call of Python; None where torch has no such table.
dlpack_exchange: Any = _find("Tensor.__dlpack_c_exchange_api__", None)


def takes_per_sample_gradients(weights: Sequence[Tensor]) -> bool:
    """Whether torch.nn.utils' call_for_per_sample_grads has replaced weights, by tensors that know torch's functions
    and no operators. Without that module there are none of those."""
    name = "torch.nn.utils._expanded_weights.expanded_weights_impl"
    kind = getattr(sys.modules.get(name), "ExpandedWeight", ())
    return any(isinstance(weight, kind) for weight in weights)


def without_wrapper(op: Any) -> Callable[..., Any]:
    """What an operator's overload calls, at the cost of a small problem less. Without it the overload."""
    inner: Callable[..., Any] = getattr(op, "_op", op)
    return inner


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without Function's own wrapper, which is for the transforms of torch.func. Without it that."""
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply


def dynamo_allowing_rnn() -> AbstractContextManager[Any]:
    """A context in which torch.compile takes instances of whatever is called torch.nn.GRU, which it refuses else.
    Without it it refuses."""
    try:
        import torch._dynamo

        config: Any = torch._dynamo.config
        return config.patch(allow_rnn=True) if hasattr(config, "allow_rnn") else contextlib.nullcontext()
    except (ImportError, AttributeError):
        return contextlib.nullcontext()
