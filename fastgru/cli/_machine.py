"""Describes the machine, the versions and the commit, without which a stored number means nothing later."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastgru
from fastgru import _library


def origin(*packages: str) -> dict[str, Any]:
    """The head of every stored record: machine, versions, those of other ``packages`` among them, and commit."""
    return {
        "machine": machine(),
        "versions": versions() | {name: installed(name) for name in packages},
        "commit": commit(),
    }


def machine() -> dict[str, Any]:
    """The hardware and how much of it torch may use."""
    try:
        isa = current_isa()
    except ValueError:
        # The commands check it first and say what is wrong.
        isa = None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "usable_isas": usable_isas(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cuda_devices": cuda_devices(),
        "why_no_direct_calls": _library.direct_error,
        "build": build(),
        "cuda_part": cuda_part(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; ``None`` for what is not installed. Imports nothing new."""
    return {
        "fastgru": installed("fastgru"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
    }


def commit() -> str | None:
    """The commit of the source tree this package runs from, with ``+dirty``; ``None`` for an installed package."""
    package = Path(fastgru.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # A package installed into a virtual environment inside somebody's repository is not part of that repository.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def build() -> dict[str, str | None] | None:
    """How the compiled library was built: ``compiler``, ``flags``, ``torch`` and ``commit``, as setup.py recorded them.

    None without the library, or for one that holds no record.
    """
    if _library.load_error is not None:
        return None
    record = getattr(ctypes.CDLL(str(_library.LIBRARY_PATH)), "fastgru_build_record", None)
    if record is None:
        return None
    record.restype = ctypes.c_char_p
    found: dict[str, str | None] = json.loads(record())
    return found


def usable_isas() -> list[str]:
    """Instruction-set variants of the C++ backend that this CPU runs, best first; empty without the extension."""
    return torch.ops.fastgru.cpu_isas().split(",") if _library.load_error is None else []


def current_isa() -> str | None:
    """The variant in use, or ``None`` without the extension.

    Raises:
        ValueError: ``FASTGRU_CPU_ISA`` names one that is unknown or does not run here.
    """
    if _library.load_error is not None:
        return None
    try:
        return str(torch.ops.fastgru.cpu_isa())
    except RuntimeError as error:
        # The first line; a debug build of torch adds a C++ backtrace.
        raise ValueError(str(error).splitlines()[0]) from None


def cuda_devices() -> list[str]:
    """Name, compute capability and memory of each visible GPU."""
    described = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        described.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB)"
        )
    return described


def cuda_part() -> dict[str, Any] | None:
    """What the CUDA part was built with and finds here; ``None`` where the compiled library has none.

    ``built_with`` and ``driver`` are CUDA versions (``driver`` is the newest it runs, ``None`` without one);
    ``devices`` says for each visible GPU which architecture of code it runs, or why none.
    """
    try:
        built_with, driver = torch.ops.fastgru.cuda_versions()
    except NotImplementedError:
        return None
    devices = []
    for index in range(torch.cuda.device_count()):
        try:
            devices.append(f"sm_{torch.ops.fastgru.cuda_code_architecture(index)}")
        except RuntimeError as error:
            devices.append(str(error).splitlines()[0])
    return {"built_with": _cuda_version(built_with), "driver": _cuda_version(driver), "devices": devices}


def _cuda_version(number: int) -> str | None:
    """``"13.0"`` for 13000, ``None`` for 0."""
    return f"{number // 1000}.{number // 10 % 100}" if number else None


def installed(package: str) -> str | None:
    """Version of a package, or ``None``. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
