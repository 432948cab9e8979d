"""Build the white-box module next to this file, unless it is newer than every source it is made of."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CPU = CSRC / "cpu"
SOURCES = [HERE / "whitebox.cpp", *(CPU / name for name in ("isa.cpp", "platform.cpp", "threads/backoff.cpp"))]
SOURCES += sorted((CPU / "engines").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-DFASTGRU_WHITEBOX"]


def build(directory: Path = HERE / "build") -> Path:
    """Compile what changed and return the path of the module; safe to call from several processes at once."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(directory)


def _build(directory: Path) -> Path:
    import pybind11

    target = directory / f"_whitebox{sysconfig.get_config_var('EXT_SUFFIX')}"
    newest = max(p.stat().st_mtime for p in [*SOURCES, *CSRC.glob("cpu/**/*.h")])
    if target.exists() and target.stat().st_mtime > newest:
        return target
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> str:
        output = str(directory / (source.stem + ".o"))
        subprocess.run([compiler, *FLAGS, *includes, "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    partial = target.with_suffix(".partial")
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", str(partial)], check=True)
    partial.replace(target)
    return target


def load() -> ModuleType:
    """The module, built if need be."""
    spec = importlib.util.spec_from_file_location("_whitebox", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
