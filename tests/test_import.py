"""Importing is lean, and the package is what its metadata say."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
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
    assert len(own) < 55
    assert not set(loaded) - set(own)


USES = """
import copy, pickle, torch

def use(fastgru):
    for backend in ("auto", "reference"):
        with fastgru.use_backend(backend):
            x = torch.randn(5, 2, 8, requires_grad=True)
            gru = fastgru.GRU(8, 4)
            gru(x)[0].sum().backward()
            gru(x, lengths=[5, 2])
            q = torch.randn(2, 2, 5, 4, requires_grad=True)
            fastgru.flash_attention(q, q, q, causal=True).sum().backward()
            fastgru.scaled_dot_product_attention(q, q, q).sum().backward()
            fastgru.MultiheadAttention(8, 2)(x, x, x, need_weights=False)[0].sum().backward()
            fastgru.additive_attention(x, x, x, x[0, 0]).sum().backward()
            with torch.no_grad():
                fastgru.GRUCell(8, 4)(x[0], torch.randn(2, 4))
                gru(x)
                fastgru.flash_attention(q, q, q, softcap=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        gru(x)
        fastgru.scaled_dot_product_attention(q, q, q)
    pickle.loads(pickle.dumps(gru))
    fastgru.revert(fastgru.convert(torch.nn.GRU(3, 4)))
    with fastgru.patch():
        torch.nn.GRU(3, 4)(torch.randn(5, 2, 3))
    assert fastgru.nn.GRU is fastgru.nn.gru.GRU is fastgru.GRU
    assert fastgru.ops.gru and fastgru.backends.registry and fastgru.flash_attn
    return gru
"""


@pytest.mark.parametrize("gone", ["all", "the top", "some", "reload"])
def test_a_second_import_in_one_process(gone: str) -> None:
    python(f"""{USES}
import importlib, sys, fastgru
first, module = fastgru, use(fastgru)
for _ in range(2):
    if {gone!r} == "reload":
        assert importlib.reload(fastgru) is first
    else:
        for name in [name for name in sys.modules if name.split(".")[0] == "fastgru"]:
            some = {gone!r} == "some" and name in ("fastgru.ops", "fastgru.nn.gru")
            if {gone!r} == "all" or name == "fastgru" or some:
                del sys.modules[name]
        import fastgru
        assert fastgru is not first
    use(fastgru)
    assert type(module) is fastgru.GRU
use(first)
""")


def private_names(source: str) -> set[str]:
    """What is read of torch by a name with an underscore, annotations aside."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name}" for name in names]
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        found |= {name for name in names if re.match(r"torch\b.*\._[a-zA-Z]", name) or "._current_level" in name}
    return {name for name in found if not name.startswith("torch._ops")}


def test_private_names_of_torch_are_in_one_place() -> None:
    found = {
        path.name: names
        for path in ROOT.glob("fastgru/**/*.py")
        if (names := private_names(path.read_text()) - {"forward_mode._current_level"})
    }
    assert found == {"_torch_private.py": {"torch._dynamo", "torch._dynamo.config"}}


def test_without_any_one_of_them_the_package_works() -> None:
    """Each name in turn is taken from torch while the package is imported, in a child of a process that has torch."""
    python(f"""{USES}
import os, re, sys, operator
import torch._dynamo, torch.utils.flop_counter
from pathlib import Path

source = Path({str(ROOT)!r}, "fastgru/_torch_private.py").read_text()
names = sorted(set(re.findall('"((?:_C|autograd|Tensor)[.][A-Za-z_.]+)"', source)))
assert len(names) >= 10, names
names += ["_dynamo.config.allow_rnn", "_C._FunctionBase.apply", "autograd.forward_ad._current_level"]
for name in names:
    child = os.fork()
    if child == 0:
        try:
            place, _, last = name.rpartition(".")
            owner = operator.attrgetter(place)(torch)
            try:
                value = getattr(owner, last)
                delattr(owner, last)
            except (AttributeError, TypeError):  # of a type in C
                os._exit(0 if last in ("apply", "AutogradFunctionality") else 1)
            import fastgru
            if name in ("_C._is_any_autocast_enabled", "_C._is_tracing", "_C._len_torch_dispatch_stack"):
                assert name in (fastgru._library.direct_error or "") or fastgru._library.load_error
            # Torch reads some of them itself when it runs.
            if last not in ("allow_rnn",):
                setattr(owner, last, value)
            use(fastgru)
            os._exit(0)
        except BaseException as error:
            import traceback
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, name
""")


def test_public_names_exist() -> None:
    for name in fastgru.__all__:
        assert getattr(fastgru, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastgru.nothing


def test_what_pickles_of_whole_modules_name_stays_where_it_is() -> None:
    places = {
        "fastgru.nn.gru": ("GRU", "GRUCell"),
        "fastgru.nn.attention": ("MultiheadAttention", "AttentionDecoder"),
        "fastgru.nn.seq2seq": ("Encoder", "Decoder", "ReferenceEncoder", "ReferenceDecoder"),
        "fastgru.nn.convert": ("Converted",),
    }
    for module, names in places.items():
        for name in names:
            found = getattr(importlib.import_module(module), name)
            assert (found.__module__, found.__qualname__) == (module, name)


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
    found |= {".".join(("fastgru", *init.relative_to(ROOT).parts[:-1])) for init in ROOT.glob("kernels/**/__init__.py")}
    assert names == found
    assert "fastgru.kernels" in names
