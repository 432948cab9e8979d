"""Build the modules that run the CUDA kernels on the CPU, unless they are newer than their sources."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-shared"]
# Fibers jump between stacks, which fortified longjmp rejects.
FLAGS += ["-U_FORTIFY_SOURCE"]


def build(name: str, directory: Path = HERE / "build") -> Path:
    """Compile ``name``.cpp if anything changed, and return the path of the module.

    Safe to call from several processes at once.
    """
    import pybind11

    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = (*HERE.glob("*"), *(CSRC / "cuda").rglob("*"))
    sources = [path for path in files if path.suffix in (".cpp", ".h", ".cuh")]
    with open(directory / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() or target.stat().st_mtime <= max(path.stat().st_mtime for path in sources):
            paths = [CSRC, HERE, pybind11.get_include(), sysconfig.get_path("include")]
            includes = [f"-I{path}" for path in paths]
            partial = target.with_suffix(".partial")
            compiler = os.environ.get("CXX", "g++")
            subprocess.run([compiler, *FLAGS, *includes, HERE / f"{name}.cpp", "-o", partial], check=True)
            partial.replace(target)
    return target


def load(name: str) -> ModuleType:
    """The module made from ``name``.cpp, built if need be."""
    spec = importlib.util.spec_from_file_location(f"_{name}", build(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
