"""Swaps torch's modules for fastgru's inside a model, and back.

A swap changes the class of a module and nothing else: parameters, buffers, hooks, ties, the training mode and every
reference to the module stay as they are. ``TABLE`` lists the pairs of classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastgru._torch_private import dynamo_allowing_rnn
from fastgru.backends import BackendUnavailable, select
from fastgru.nn.attention import MultiheadAttention
from fastgru.nn.gru import GRU, GRUCell, TorchGRU, TorchGRUCell

_Model = TypeVar("_Model", bound=nn.Module)


class Swap(NamedTuple):
    """A pair of classes, each the other's drop-in.

    Args:
        original: torch's class.
        replacement: ours.
        family: the operators that ours runs on.
        calls: the methods that torch's ``forward`` is made of. A subclass that overrides one is left alone.
    """

    original: type[nn.Module]
    replacement: type[nn.Module]
    family: str
    calls: tuple[str, ...] = ("forward",)


_RNN_CALLS = (
    "forward",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "permute_hidden",
)

TABLE = (
    Swap(TorchGRU, GRU, "gru", _RNN_CALLS),
    Swap(TorchGRUCell, GRUCell, "gru"),
    Swap(nn.MultiheadAttention, MultiheadAttention, "attention"),
)

# Where torch derives a class from a module's own at run time: register_parametrization, fully_shard, replicate.
_WRAPPING_MODULES = ("torch.nn.utils.parametrize", "torch.distributed.")


class ReportEntry(NamedTuple):
    """One module that the table knows.

    Args:
        name: its path in the model, "" for the model itself.
        kind: the name of its class.
        swapped: it runs on fastgru.
        detail: the backend it gets when it is swapped, else why it is not.
    """

    name: str
    kind: str
    swapped: bool
    detail: str

    def __str__(self) -> str:
        state = f"fastgru, backend {self.detail}" if self.swapped else f"torch, {self.detail}"
        return f"{self.name or '(the model itself)'}: {self.kind}: {state}"


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did, or would do, to each module of a model. ``str()`` gives a line to each."""

    entries: tuple[ReportEntry, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "no " + ", ".join(f"nn.{swap.original.__name__}" for swap in TABLE) + " in this model"
        return "\n".join(str(entry) for entry in self.entries)


def convert(model: _Model, *, keep_types: bool = False) -> _Model:
    """Make ``model``, or every ``nn.GRU``, ``nn.GRUCell`` and ``nn.MultiheadAttention`` in it, run on fastgru;
    in place.

    The modules stay the same objects and only change class, so optimizers, hooks, parametrizations, shared modules and
    tied weights do not notice. ``isinstance(module, nn.GRU)`` is false afterwards, because torch.compile refuses what
    is an ``nn.GRU``: ask for ``(nn.GRU, fastgru.GRU)``, or, where the code is not yours, set ``keep_types``.

    Subclasses of torch's classes are swapped too, and remain instances of their own class, unless they override
    ``forward`` or a method that it calls. Those are left alone: :func:`conversion_report` says which and why.

    Args:
        model: a module.
        keep_types: leave ``isinstance(module, nn.GRU)`` true, for code that asks. torch.compile then breaks the graph
            at the module, as it does at torch's.

    Returns:
        ``model``.
    """
    for module, swap in _known(model):
        if isinstance(module, swap.original) and _why_not(module, swap) is None:
            original: type = swap.original
            target: type = swap.replacement
            # Instances of subclasses stay that anyway.
            if keep_types and original not in target.__mro__ and _unwrapped(type(module), original) is original:
                target = _subclass(original, original, target)
            _set_class(module, original, target)
    return model


def revert(model: _Model) -> _Model:
    """Undo :func:`convert`, in place; modules built as ``fastgru.GRU`` become torch's as well.

    User-written subclasses of fastgru's classes are left alone.

    Returns:
        ``model``.
    """
    for module, swap in _known(model):
        if isinstance(module, swap.replacement) and not _is_subclassed(type(module), swap.replacement):
            _set_class(module, swap.replacement, swap.original)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """Which modules of ``model`` run on fastgru and on which backend, and for the others why not. Changes nothing."""
    entries = []
    names = {module: name for name, module in model.named_modules()}
    for module, swap in _known(model):
        swapped = isinstance(module, swap.replacement)
        detail = _backend(module, swap) if swapped else _why_not(module, swap) or "not converted yet"
        entries.append(ReportEntry(names[module], type(module).__name__, swapped, detail))
    return ConversionReport(tuple(entries))


@contextmanager
def patch() -> Iterator[None]:
    """Within this context, or a function decorated with it, ``torch.nn.GRU`` and ``GRUCell`` are fastgru's classes.

    That serves code which builds or subclasses ``torch.nn.GRU`` (also as ``torch.nn.modules.GRU``) while the context is
    open, on any thread. It does not reach names taken before, as by ``from torch.nn import GRU``: use :func:`convert`
    on what such code builds. Within, ``isinstance(module, torch.nn.GRU)`` is true for fastgru's modules, and false for
    torch's own.
    """
    names = [(place, swap) for place in (torch.nn, torch.nn.modules) for swap in TABLE]
    before = [getattr(place, swap.original.__name__) for place, swap in names]
    with dynamo_allowing_rnn():
        try:
            for place, swap in names:
                setattr(place, swap.original.__name__, swap.replacement)
            yield
        finally:
            for (place, swap), value in zip(names, before, strict=True):
                setattr(place, swap.original.__name__, value)


def _known(model: nn.Module) -> Iterator[tuple[nn.Module, Swap]]:
    for module in list(model.modules()):
        for swap in TABLE:
            if isinstance(module, (swap.original, swap.replacement)):
                yield module, swap


def _why_not(module: nn.Module, swap: Swap) -> str | None:
    """None if ``module``, an instance of ``swap.original``, can be swapped, else the reason."""
    cls = type(module)
    if isinstance(module, swap.replacement):
        return "fastgru's already"
    if "forward" in vars(module):
        return "left alone: its forward was replaced on the instance"
    overridden = [name for name in swap.calls if getattr(cls, name) is not getattr(swap.original, name)]
    if overridden:
        return f"left alone: {cls.__name__} overrides {', '.join(overridden)}"
    return None


def _backend(module: nn.Module, swap: Swap) -> str:
    # FullyShardedDataParallel leaves tensors in the place of parameters.
    parameter = next(value for value in (*module.parameters(), *vars(module).values()) if isinstance(value, Tensor))
    try:
        return select(swap.family, parameter.device, parameter.dtype).name
    except BackendUnavailable as error:
        return f"none: {error}"


def _is_wrapper(cls: type) -> bool:
    return cls.__module__.startswith(_WRAPPING_MODULES)


def _unwrapped(cls: type, kind: type) -> type:
    """The class beneath the wrappers of ``cls``, which derives from ``kind``."""
    while _is_wrapper(cls):
        cls = next(base for base in cls.__bases__ if issubclass(base, kind))
    return cls


def _is_subclassed(cls: type, replacement: type) -> bool:
    """Whether a user derived ``cls`` from ``replacement``."""
    cls = _unwrapped(cls, replacement)
    return cls is not replacement and "_fastgru_original" not in vars(cls)


def _set_class(module: nn.Module, source: type, target: type) -> None:
    module.__class__ = _swapped(type(module), source, target)
    if isinstance(module, nn.RNNBase):
        # torch's class keeps a list of the weights here; ours does not.
        vars(module).pop("_flat_weights", None)
        module._init_flat_weights()


def _swapped(cls: type, source: type, target: type) -> type:
    """The class for an instance of ``cls`` that is to be a ``target`` where it is a ``source``."""
    if cls is source:
        return target
    if _is_wrapper(cls):
        bases = tuple(_swapped(base, source, target) if issubclass(base, source) else base for base in cls.__bases__)
        namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        return type(cls)(cls.__name__, bases, namespace)
    original: type | None = vars(cls).get("_fastgru_original")
    return original or _subclass(cls, source, target)


class _Unannounced:
    """A first base, for classes that the ``__init_subclass__`` of the others is not to hear of: it may want arguments,
    or keep a register."""

    def __init_subclass__(cls) -> None:
        pass


@functools.cache
def _subclass(cls: type, source: type, target: type) -> type:
    """A subclass of ``cls``, which derives from ``source``, with the methods of ``target`` that ``cls`` has not of its
    own."""
    own: dict[str, Any] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(source)]):
        own |= {name: value for name, value in vars(base).items() if name in vars(target)}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}

    def reduce(self: Any, protocol: Any) -> Any:
        # pickle and deepcopy find no class of this name: they are to make it again.
        reduced: Any = object.__reduce_ex__(self, protocol)
        return Converted, (cls, source, target), *reduced[2:]

    namespace = {**own, **names, "_fastgru_original": cls, "__reduce_ex__": reduce}
    return type(cls)(cls.__name__, (_Unannounced, target, cls), namespace)


class Converted:
    """What pickle and deepcopy make of a converted module of a class that has no name of its own; with its state it
    becomes that. ``torch.load`` takes it if it is among the ``torch.serialization.add_safe_globals``.
    """

    _becomes: type

    def __new__(cls, kind: type, source: type, target: type) -> Any:
        made = _subclass(kind, source, target)
        # What has slots cannot be of another class first.
        instance: Any = object.__new__(cls if made.__basicsize__ == cls.__basicsize__ else made)
        if type(instance) is cls:
            instance._becomes = made
        return instance

    def __setstate__(self, state: Any) -> None:
        self.__class__ = vars(self).pop("_becomes")
        self.__setstate__(state)
