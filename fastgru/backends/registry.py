"""Chooses the backend of an operator family: one asked for by name runs or raises; ``auto`` falls back, and warns once.

A backend registers where it can run; a family of operators says which backends implement it, and where each is faster.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch

AUTO = "auto"

#: What messages call the families of operators.
FAMILIES = {"gru": "GRU", "attention": "attention", "additive": "additive attention"}


class BackendUnavailable(RuntimeError):  # noqa: N818 (a public name that reads as what it says)
    """The backend asked for cannot run here. The message holds the reason and the remedy."""


class Sizes(NamedTuple):
    """What decides, with device and dtype, which backend is the fastest for a GRU layer."""

    hidden: int
    batch: int
    steps: int
    directions: int
    training: bool
    packed: bool


@dataclass(frozen=True)
class Backend:
    """Where one set of kernels can run.

    Args:
        name: prefix of its operators, and the name users ask for.
        devices: device types it runs on; ``"*"`` stands for all.
        priority: ``auto`` takes the highest that supports the problem.
        available: None, or why it cannot run in this process and the remedy.
        supports: None, or why it does not take tensors of this device type and dtype.
    """

    name: str
    devices: tuple[str, ...]
    priority: int
    available: Callable[[], str | None]
    supports: Callable[[str, torch.dtype], str | None]

    def why_not(self, device: str, dtype: torch.dtype) -> str | None:
        """None when this backend can run the problem, else the reason."""
        if "*" not in self.devices and device not in self.devices:
            return f"it runs on {', '.join(self.devices)}, not on {device}"
        return self.available() or self.supports(device, dtype)


@dataclass(frozen=True)
class Implementation:
    """The operators ``fastgru::<backend>_<family>_<pass>``. A *problem* is what the family decides by, or None.

    Args:
        wins: where it is not always faster than those of lower priority: whether it is, for a problem, or by and large.
        refuses: where it does not take every problem: None, or why it does not take this one.
        covers: what :func:`explain` adds: which problems of a dtype it has kernels for.
    """

    wins: Callable[[torch.device, torch.dtype, Any], bool] | None = None
    refuses: Callable[[torch.device, torch.dtype, Any], str | None] | None = None
    covers: Callable[[torch.dtype], str] | None = None


class _Choice:
    """A backend asked for, None for what the environment says, and what has been chosen on that account."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.chosen: dict[tuple[str, torch.device | str, torch.dtype], Backend] = {}
        _choices.add(self)


class _Block(threading.local):
    """The choice of the innermost ``with use_backend(...)`` of a thread. (Not a ContextVar: torch.compile traces none,
    and guards on this.)"""

    choice: _Choice | None = None

    def __init__(self) -> None:
        # Of autograd, as a rule, whose threads run the backward passes on GPUs, and forward passes for checkpoints.
        self.not_started_by_python = threading.current_thread().name.startswith("Dummy-")


_backends: dict[str, Backend] = {}
_implementations: dict[tuple[str, str], Implementation] = {}
_warned: set[tuple[str, torch.dtype, str]] = set()
_choices: weakref.WeakSet[_Choice] = weakref.WeakSet()
_process = _Choice(None)
_block = _Block()
# The choices of all open blocks, of all threads: without any there is no need to look for the thread's.
_open: list[_Choice] = []


def register(backend: Backend) -> None:
    """Add a backend. A second one of the same name replaces the first."""
    _backends[backend.name] = backend
    forget()


def implement(family: str, backend: str, implementation: Implementation = Implementation()) -> None:
    """Add what a backend has of a family of operators."""
    _implementations[family, backend] = implementation
    forget()


def forget() -> None:
    """Has every choice made anew: after a change of what there is to choose from."""
    for choice in list(_choices):
        choice.chosen.clear()


def backends(family: str | None = None) -> list[Backend]:
    """Every known backend, or every one that has a family of operators, best first."""
    known = [b for b in _backends.values() if family is None or (family, b.name) in _implementations]
    return sorted(known, key=lambda backend: -backend.priority)


def goes_by_problem(family: str, backend: Backend) -> bool:
    """Whether :func:`fastest` has to be asked as well where :func:`select` chose ``backend``."""
    return _implementations[family, backend.name].wins is not None


def refusal(family: str, backend: str, device: torch.device, dtype: torch.dtype, problem: Any) -> str | None:
    """Why a backend that runs this device and dtype does not take a problem; None if it does."""
    refuses = _implementations[family, backend].refuses
    return None if refuses is None or problem is None else refuses(device, dtype, problem)


def requested() -> str:
    """The name asked for by :class:`use_backend` or ``FASTGRU_BACKEND``; ``"auto"`` by default.

    Raises:
        ValueError: the name is not known.
    """
    choice = _current()
    if choice.name is not None:
        return choice.name
    name = os.environ.get("FASTGRU_BACKEND") or AUTO
    _check_name(name, "FASTGRU_BACKEND: ")
    return name


def _current() -> _Choice:
    if _block.choice is not None:
        return _block.choice
    return _open[-1] if _block.not_started_by_python and _open else _process


def _check_name(name: str, prefix: str = "") -> None:
    if name != AUTO and name not in _backends:
        known = ", ".join([AUTO, *sorted(_backends)])
        raise ValueError(f"{prefix}unknown backend {name!r}; known backends: {known}")


class use_backend:
    """Choose the backend for the whole process: ``use_backend("cpu")``.

    Called plainly it holds for every thread until the next call. As a context manager it holds for the block, in the
    thread that entered it: threads started within do not inherit it. (Those of autograd, which Python does not know, go
    by the block entered last.) A plain call within a block ends with the block.
    ``"auto"`` gives the choice back to fastgru. A graph built under one backend runs its backward on that same backend,
    whatever is chosen later.

    Raises:
        ValueError: the name is not known.
        BackendUnavailable: the backend cannot run in this process.
    """

    def __init__(self, name: str) -> None:
        global _process
        _check_name(name)
        reason = _backends[name].available() if name != AUTO else None
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run: {reason}")
        self._choice = _Choice(name)
        self._before = _process, _block.choice
        if _block.choice is None:
            _process = self._choice
        else:
            _block.choice = self._choice

    def __enter__(self) -> None:
        global _process
        process, block = self._before
        # That it is a block is known only now.
        if block is None and _process is self._choice:
            _process = process
        _block.choice = self._choice
        _open.append(self._choice)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _block.choice = self._before[1]
        _open.remove(self._choice)


def select(family: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend that runs a family's operators on tensors of this device and dtype.

    Raises:
        BackendUnavailable: the backend asked for cannot run this, or has no such operators, or no backend can.
        ValueError: ``FASTGRU_BACKEND`` holds an unknown name.
    """
    if torch.compiler.is_compiling():
        # Traced, so that the graph is guarded on the choice; a cache that changes would only make it compile again.
        return _choose(family, device, dtype)
    choice = _current()
    backend = choice.chosen.get((family, device, dtype))
    if backend is None:
        backend = choice.chosen[family, device, dtype] = _choose(family, device, dtype)
    return backend


def selected(family: str, device: torch.device | str, dtype: torch.dtype) -> Backend | None:
    """What :func:`select` chose when it was last called for these, if that still holds."""
    choice = _current() if _open else _process
    return choice.chosen.get((family, device, dtype))


def fastest(family: str, device: torch.device, dtype: torch.dtype, problem: Any) -> Backend:
    """As :func:`select`, but ``auto`` passes over a backend that does not win a problem, or refuses it. A compiler does
    not know it: None."""
    best = select(family, device, dtype)
    if requested() != AUTO:
        return best
    usable = [b for b in backends(family) if b.priority <= best.priority and b.why_not(device.type, dtype) is None]
    refused: dict[str, str] = {}
    for backend in usable:
        wins = _implementations[family, backend.name].wins
        if wins is None or wins(device, dtype, problem):
            reason = refusal(family, backend.name, device, dtype, problem)
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


def _has_none(name: str, family: str) -> str:
    able = [repr(backend.name) for backend in backends(family)]
    return f"backend {name!r} has no {FAMILIES[family]}, only {', '.join(able)} {'has' if len(able) == 1 else 'have'}"


def _choose(family: str, device_or_type: torch.device | str, dtype: torch.dtype) -> Backend:
    place = torch.device(device_or_type)
    device = place.type
    name = requested()
    if name != AUTO:
        reason = _backends[name].why_not(device, dtype)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run {dtype} on {device}: {reason}")
        if (family, name) not in _implementations:
            raise BackendUnavailable(f"{_has_none(name, family)}; use_backend('auto') takes the fastest that has it")
        return _backends[name]
    able = backends(family)
    reasons = {backend.name: backend.why_not(device, dtype) for backend in able}
    usable = [backend for backend in able if reasons[backend.name] is None]
    if not usable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendUnavailable(f"no backend can run {dtype} on {device} ({listed})")
    # Backends made for other devices, or seldom faster, are no loss worth a warning.
    losses: dict[str, str | None] = {}
    for backend in able:
        if backend.priority > usable[0].priority and device in backend.devices:
            wins = _implementations[family, backend.name].wins
            if wins is None or wins(place, dtype, None):
                losses[backend.name] = reasons[backend.name]
    # Nor is that the fallback runs where it is all that a family has, but it is where others lack the family.
    if usable[0] is able[-1] and len(able) > 1:
        for backend in backends():
            if backend not in able and device in backend.devices and backend.why_not(device, dtype) is None:
                losses[backend.name] = _has_none(backend.name, family)
    _say_why(usable[0], place, dtype, losses)
    return usable[0]


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Say in words which backend runs the GRU on this device and dtype, why each of the others does not, and what runs
    the families of operators that run elsewhere.

    Raises:
        ValueError: ``FASTGRU_BACKEND`` holds an unknown name.
    """
    device_type = torch.device(device).type
    name = requested()
    lines = [f"{dtype} on {device_type}, backend asked for: {name}"]
    taken: str | None = None
    verdict = "chosen"
    for backend in backends():
        reason = backend.why_not(device_type, dtype)
        if reason is None and name not in (AUTO, backend.name):
            reason = f"{name!r} was asked for"
        found = _implementations.get(("gru", backend.name))
        if reason is None and found is None:
            lines.append(f"  {backend.name}: {_other_families(backend.name, name == AUTO, dtype)}")
            continue
        if reason is None and taken is not None:
            reason = "a faster one is chosen"
        by_size = reason is None and name == AUTO and found is not None and found.wins is not None
        if reason is None and not by_size:
            taken = backend.name
        note = f"{verdict} for the sizes at which it was measured to be faster" if by_size else verdict
        lines.append(f"  {backend.name}: {note if reason is None else 'not used: ' + reason}")
        verdict = "chosen for all others" if by_size else verdict
    return "\n".join(lines + _elsewhere(device_type, dtype, name, taken))


def _other_families(backend: str, auto: bool, dtype: torch.dtype) -> str:
    """What a backend without a GRU is for."""
    notes = []
    for (family, name), found in _implementations.items():
        if name == backend:
            where = " where it was measured to be faster" * (auto and found.wins is not None)
            covers = "" if found.covers is None else f"; {found.covers(dtype)}"
            notes.append(f"for {FAMILIES[family]} only{where}{covers}")
    return "; ".join(notes)


def _elsewhere(device: str, dtype: torch.dtype, name: str, taken: str | None) -> list[str]:
    """Lines for the families that do not run where the GRU does."""
    lines = []
    for family, title in FAMILIES.items():
        able = [b for b in backends(family) if name in (AUTO, b.name) and b.why_not(device, dtype) is None]
        always = [b.name for b in able if name != AUTO or _implementations[family, b.name].wins is None]
        if able and always[0] != taken:
            lines.append(f"  {title}: runs on {always[0]!r}")
        elif not able and name != AUTO and (family, name) not in _implementations:
            lines.append(f"  {title}: does not run: {_has_none(name, family)}")
    return lines
