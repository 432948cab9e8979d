"""Importing is lean, and the package is what its metadata say."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import fastgru

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_neither_triton_nor_the_compiler_nor_cuda() -> None:
    loaded = python("""
import sys, torch
before = set(sys.modules)
import fastgru
assert not torch.cuda.is_initialized()
print("\\n".join(set(sys.modules) - before))
""").split()
    assert not [name for name in loaded if name.split(".")[0] in ("triton", "numpy", "rich", "tqdm", "matplotlib")]
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "torch.cuda"))]
    assert not [name for name in loaded if name.startswith("fastgru.cli")]


def test_import_runs_little_code_beyond_torch() -> None:
    """What an import costs, counted rather than timed: a few dozen small modules of our own, and none of others."""
    loaded = python("""
import sys, torch
before = set(sys.modules)
import fastgru
print("\\n".join(set(sys.modules) - before))
""").split()
    own = [name for name in loaded if name.split(".")[0] == "fastgru"]
    assert len(own) < 40
    assert not set(loaded) - set(own)


def test_public_names_exist() -> None:
    for name in fastgru.__all__:
        assert getattr(fastgru, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastgru.nothing


def test_one_version_number() -> None:
    assert fastgru.__version__ == importlib.metadata.version("fastgru")
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version ="))
    # A build with a CUDA part adds which, as in 0.1.0+cu130.
    assert fastgru.__version__.partition("+")[0] == line.split('"')[1]


def test_the_package_list_is_the_tree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("packages = [\n")[2].partition("]")[0]
    names = {line.strip().strip('",') for line in listed.splitlines() if line.strip()}
    found = {".".join(init.relative_to(ROOT).parts[:-1]) for init in ROOT.glob("fastgru/**/__init__.py")}
    assert names == found | {"fastgru.kernels"}
    assert (ROOT / "kernels" / "__init__.py").exists()
