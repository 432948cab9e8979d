"""Which backend runs: one asked for by name runs or raises; only ``auto`` chooses, and says once why it fell back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch

AUTO = "auto"


class BackendUnavailable(RuntimeError):  # noqa: N818 (a public name that reads as what it says)
    """The backend asked for cannot run here. The message holds the reason and the remedy."""


class Sizes(NamedTuple):
    """What, beside device and dtype, decides which backend is faster for a layer."""

    hidden: int
    batch: int
    steps: int
    directions: int
    training: bool
    packed: bool


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators ``fastgru::<name>_gru_{infer,train,backward}``.

    Args:
        name: prefix of its operators, and the name users ask for.
        devices: device types it runs on; ``"*"`` stands for all.
        priority: ``auto`` takes the highest that supports the problem.
        available: None, or why it cannot run in this process and the remedy.
        supports: None, or why it does not take tensors of this device type and dtype.
        wins: where it is not always faster than those of lower priority: whether it is, for a problem of these sizes,
            or by and large.
        refuses: where it does not take all sizes: None, or why it does not take these.
        attention_only: it has no GRU, and ``auto`` takes it for the attention that it was measured to be faster for.
        covers: what :func:`explain` adds: which problems of a dtype it has kernels for.
    """

    name: str
    devices: tuple[str, ...]
    priority: int
    available: Callable[[], str | None]
    supports: Callable[[str, torch.dtype], str | None]
    wins: Callable[[torch.device, torch.dtype, Sizes | None], bool] | None = None
    refuses: Callable[[torch.device, torch.dtype, Sizes], str | None] | None = None
    attention_only: bool = False
    covers: Callable[[torch.dtype], str] | None = None

    def why_not(self, device: str, dtype: torch.dtype) -> str | None:
        """None when this backend can run the problem, else the reason."""
        if "*" not in self.devices and device not in self.devices:
            return f"it runs on {', '.join(self.devices)}, not on {device}"
        return self.available() or self.supports(device, dtype)


_backends: dict[str, Backend] = {}
_chosen: dict[tuple[torch.device | str, torch.dtype], Backend] = {}
_warned: set[tuple[str, torch.dtype, str]] = set()
# None until use_backend() is called: the environment variable decides then.
_requested: str | None = None


def register(backend: Backend) -> None:
    """Add a backend. A second one of the same name replaces the first."""
    _backends[backend.name] = backend
    _chosen.clear()


def backends() -> list[Backend]:
    """Every known backend, best first."""
    return sorted(_backends.values(), key=lambda backend: -backend.priority)


def _of_everything() -> list[Backend]:
    return [backend for backend in backends() if not backend.attention_only]


def requested() -> str:
    """The name asked for by :class:`use_backend` or ``FASTGRU_BACKEND``; ``"auto"`` by default.

    Raises:
        ValueError: the name is not known.
    """
    if _requested is not None:
        return _requested
    name = os.environ.get("FASTGRU_BACKEND") or AUTO
    _check_name(name, "FASTGRU_BACKEND: ")
    return name


def _check_name(name: str, prefix: str = "") -> None:
    if name != AUTO and name not in _backends:
        known = ", ".join([AUTO, *sorted(_backends)])
        raise ValueError(f"{prefix}unknown backend {name!r}; known backends: {known}")


class use_backend:
    """Choose the backend for the whole process: ``use_backend("cpu")``.

    Called plainly it holds until the next call. As a context manager it also restores the previous choice at the end of
    the block. ``"auto"`` gives the choice back to fastgru. A graph built under one backend runs its backward on that
    same backend, whatever is chosen later.

    Raises:
        ValueError: the name is not known.
        BackendUnavailable: the backend cannot run in this process.
    """

    def __init__(self, name: str) -> None:
        global _requested
        _check_name(name)
        reason = _backends[name].available() if name != AUTO else None
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run: {reason}")
        self._previous = _requested
        _requested = name
        _chosen.clear()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous
        _chosen.clear()


def select(device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend that runs tensors of this device and dtype.

    Raises:
        BackendUnavailable: the backend asked for cannot run this, or no backend can.
        ValueError: ``FASTGRU_BACKEND`` holds an unknown name.
    """
    if torch.compiler.is_compiling():
        # Traced, so that the graph is guarded on the choice; a cache that changes would only make it compile again.
        return _choose(device, dtype)
    backend = _chosen.get((device, dtype))
    if backend is None:
        backend = _chosen[device, dtype] = _choose(device, dtype)
    return backend


def selected(device: torch.device | str, dtype: torch.dtype) -> Backend | None:
    """What :func:`select` chose when it was last called for this device and dtype, if that still holds."""
    return _chosen.get((device, dtype))


def fastest(device: torch.device, dtype: torch.dtype, sizes: Sizes | None) -> Backend:
    """As :func:`select`, but ``auto`` passes over a backend that does not win a problem of these sizes, or refuses it.
    A compiler does not know them: None."""
    best = select(device, dtype)
    if requested() != AUTO:
        return best
    usable = [b for b in _of_everything() if b.priority <= best.priority and b.why_not(device.type, dtype) is None]
    refused: dict[str, str] = {}
    for backend in usable:
        if backend.wins is None or backend.wins(device, dtype, sizes):
            reason = None if backend.refuses is None or sizes is None else backend.refuses(device, dtype, sizes)
            if reason is None:
                _say_why(backend, device, dtype, refused)
                return backend
            refused[backend.name] = reason
    return best


def fall_back(name: str, successors: Sequence[str], device: torch.device, dtype: torch.dtype, reason: str) -> Backend:
    """The first of ``successors`` that can run a problem that backend ``name`` turned down as late as at its launch.

    Raises:
        BackendUnavailable: ``name`` was asked for.
    """
    if requested() == name:
        raise BackendUnavailable(
            f"backend {name!r} cannot run {dtype} on {device.type}: {reason}; use_backend('auto') takes the next best"
        )
    backend = next(b for b in map(_backends.__getitem__, successors) if b.why_not(device.type, dtype) is None)
    _say_why(backend, device, dtype, {name: reason})
    return backend


def _say_why(backend: Backend, device: torch.device, dtype: torch.dtype, passed_over: Mapping[str, str | None]) -> None:
    """Warns, once per reason, that a backend runs in the place of others."""
    if passed_over and not torch.compiler.is_compiling():
        listed = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        why = f"because {listed}"
        if (device.type, dtype, why) not in _warned:
            _warned.add((device.type, dtype, why))
            message = f"fastgru runs {dtype} on {device.type} with the backend {backend.name!r}, {why}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _choose(device_or_type: torch.device | str, dtype: torch.dtype) -> Backend:
    place = torch.device(device_or_type)
    device = place.type
    name = requested()
    if name != AUTO:
        reason = _backends[name].why_not(device, dtype)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run {dtype} on {device}: {reason}")
        return _backends[name]
    reasons = {backend.name: backend.why_not(device, dtype) for backend in _of_everything()}
    usable = [backend for backend in _of_everything() if reasons[backend.name] is None]
    if not usable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendUnavailable(f"no backend can run {dtype} on {device} ({listed})")
    # Backends made for other devices, or seldom faster, are no loss worth a warning.
    made_for_it = [b for b in _of_everything() if b.priority > usable[0].priority and device in b.devices]
    losses = [b.name for b in made_for_it if b.wins is None or b.wins(place, dtype, None)]
    _say_why(usable[0], place, dtype, {name: reasons[name] for name in losses})
    return usable[0]


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Say in words which backend runs tensors of this device and dtype, and why each of the others does not.

    Raises:
        ValueError: ``FASTGRU_BACKEND`` holds an unknown name.
    """
    device_type = torch.device(device).type
    name = requested()
    lines = [f"{dtype} on {device_type}, backend asked for: {name}"]
    taken = False
    verdict = "chosen"
    for backend in backends():
        reason = backend.why_not(device_type, dtype)
        if reason is None and name not in (AUTO, backend.name):
            reason = f"{name!r} was asked for"
        if reason is None and backend.attention_only:
            where = " where it was measured to be faster" * (name == AUTO)
            covers = "" if backend.covers is None else f"; {backend.covers(dtype)}"
            lines.append(f"  {backend.name}: for attention only{where}{covers}")
            continue
        if reason is None and taken:
            reason = "a faster one is chosen"
        by_size = reason is None and name == AUTO and backend.wins is not None
        taken = taken or (reason is None and not by_size)
        note = f"{verdict} for the sizes at which it was measured to be faster" if by_size else verdict
        lines.append(f"  {backend.name}: {note if reason is None else 'not used: ' + reason}")
        verdict = "chosen for all others" if by_size else verdict
    return "\n".join(lines)
