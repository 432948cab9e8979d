"""The checks of a wheel refuse what they are there to refuse. `make wheel` runs these first; they need its tools."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

for tool in ("abi3audit", "auditwheel", "elftools", "torch_abi_audit", "twine"):
    pytest.importorskip(tool, reason=f"{tool} is missing: pip install 'fastgru[wheel]'")

CHECK = runpy.run_path(str(Path(__file__).parents[1] / "tools/check_wheel.py"))
PLATFORM = f"manylinux_2_28_{platform.machine()}"
METADATA = """Metadata-Version: 2.1
Name: fastgru
Version: 0.1.0
Summary: A wheel
Description-Content-Type: text/markdown
Requires-Dist: torch>=2.10
Requires-Dist: rich>=13; extra == "demo"

Text.
"""
CUBINS = {"": "", "manifest.json": '{"kernels": {"one": {"file": "one.cubin"}}}', "one.cubin": "code"}
CODE = 'extern "C" int aoti_torch_abi_version(); int f() { return aoti_torch_abi_version(); }\n'


def check(
    directory: Path,
    name: str = "fastgru-0.1.0",
    code: str = "",
    module: str | None = "",
    flags: tuple[str, ...] = (),
    cubins: dict[str, str] | None = None,
    **more: str,
) -> None:
    """Check a small wheel; ``more`` replaces or adds files.

    Its library is made of ``code`` and one call of torch, the module beside it of ``module`` and one call of Python.
    ``cubins`` are the kernels compiled ahead: those of a CUDA wheel, unless others are given.
    """
    source, library = directory / "code.cpp", directory / "_C.so"
    source.write_text(CODE + code)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-shared", "-fPIC", *flags, str(source), "-o", str(library)], check=True)
    if module is not None:
        source.write_text('extern "C" int PyErr_Occurred(); int f() { return PyErr_Occurred(); }\n' + module)
        target = directory / "_direct.abi3.so"
        subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    files = {
        "METADATA": METADATA,
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{PLATFORM}\n",
        "RECORD": "fastgru/_C.so,,\n",  # auditwheel looks at what is listed
        "licenses/LICENSE": "",
    }
    info = "fastgru-0.1.0" if name.endswith(".whl") else name
    files = {f"{info}.dist-info/{file}": text for file, text in {**files, **more}.items() if "so" not in file}
    files |= {"fastgru/py.typed": ""}
    files |= {f"fastgru/kernels/{package}__init__.py": "" for package in ("", "attention/", "attention_sm90/", "gru/")}
    cubins = (CUBINS if "+cu" in name else {}) if cubins is None else cubins
    files |= {f"fastgru/cubins/{file}": text for file, text in cubins.items()}
    files |= {file: text for file, text in more.items() if "so" in file}
    wheel = directory / (name if name.endswith(".whl") else f"{name}-py3-none-{PLATFORM}.whl")
    with zipfile.ZipFile(wheel, "w") as content:
        content.write(library, "fastgru/_C.so")
        if module is not None:
            content.write(target, "fastgru/_direct.abi3.so")
        for file, text in files.items():
            content.writestr(file, text)
    CHECK["check_file"](wheel)


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    check(tmp_path)


def device_code(*entries: tuple[int, int]) -> str:
    """A library's device code as nvcc would leave it: machine code (2) and PTX (1) for architectures."""
    code = b"".join(struct.pack("<HHIQQII", kind, 0, 32, 8, 0, 0, number) + bytes(8) for kind, number in entries)
    data = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(code)) + code
    section = '__attribute__((section(".nv_fatbin"), used))'
    return f"{section} static const unsigned char fatbin[] = {{{', '.join(map(str, data))}}};"


CUDA = {"name": "fastgru-0.1.0+cu130", "METADATA": METADATA.replace("0.1.0", "0.1.0+cu130")}


def test_a_cuda_wheel_passes_and_says_for_what_it_holds_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tmp_path, code=device_code((2, 80), (2, 90), (1, 90)), **CUDA)
    assert "device code: compute_90, sm_80, sm_90" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_device_code_is_found_where_nvcc_puts_it(tmp_path: Path) -> None:
    source, library = tmp_path / "two.cu", tmp_path / "two.o"
    source.write_text("__global__ void kernel(float* p) { *p = 1; }\n")
    targets = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]")
    subprocess.run(["nvcc", "-c", *targets, str(source), "-o", str(library)], check=True)
    with library.open("rb") as file:
        assert CHECK["device_code"](CHECK["ELFFile"](file)) == {"sm_80", "sm_90", "compute_90"}


def test_a_wheel_for_pypi_is_not_larger_than_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECK["check_file"].__globals__, "PYPI_BYTES", 1000)
    with pytest.raises(SystemExit, match="bytes are more than the 1,000 that PyPI takes"):
        check(tmp_path)
    check(tmp_path, code=device_code((2, 80), (1, 80)), **CUDA)


def call(function: str) -> str:
    return f'extern "C" int {function}(...); int g() {{ return {function}(0, 0); }}\n'


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "fastgru-0.1.0+cu130"}, "the metadata say version 0.1.0"),
        ({"name": f"fastgru-0.1.0-cp310-abi3-{PLATFORM}.whl"}, "the metadata say tags"),
        ({"WHEEL": "Tag: cp310-abi3-linux\n", "name": "fastgru-0.1.0-cp310-abi3-linux.whl"}, "not for every Python 3"),
        ({"WHEEL": "Tag: py3-none-linux\n", "name": "fastgru-0.1.0-py3-none-linux.whl"}, "is not for manylinux_2_28"),
        ({"METADATA": METADATA.replace("torch>=2.10", "numpy")}, "it requires ['numpy'], not torch alone"),
        ({"fastgru.libs/libcudart.so.13": ""}, "not fastgru/_C.so and fastgru/_direct.abi3.so alone"),
        ({"module": None}, "it holds ['fastgru/_C.so'], not"),
        ({"module": call("aoti_torch_get_dim")}, "needs ['aoti_torch_get_dim'], which are not Python's"),
        ({"module": call("_PyLong_Sign")}, "1 ABI violations found"),
        ({"module": call("PyObject_Vectorcall")}, "1 ABI version mismatches"),
        ({"flags": ("-Wl,-rpath,/somewhere",)}, "names folders of the machine it was built on"),
        ({"code": call("PyLong_AsLong")}, "it needs ['PyLong_AsLong']"),
        ({"code": call("cudaFree")}, "it needs ['cudaFree']"),
        ({"code": "namespace c10 { int h(); } int g() { return c10::h(); }"}, "torch's stable ABI: ('c10::h()'"),
        ({"code": call("torch_from_blob")}, "('torch_from_blob',) need torch 2.11"),
        ({"code": call("aoti_torch_nothing")}, "torch-abi-audit does not know ('aoti_torch_nothing',)"),
        ({**CUDA, "cubins": {}}, "kernels compiled ahead belong into a CUDA wheel"),
        ({"cubins": CUBINS}, "kernels compiled ahead belong into a CUDA wheel"),
        ({**CUDA, "cubins": {**CUBINS, "two.cubin": ""}}, "its manifest lists"),
        (CUDA, "its device code is [], not machine code and PTX"),
        ({**CUDA, "code": device_code((2, 80), (2, 90))}, "its device code is ['sm_80', 'sm_90'], not"),
        ({"code": device_code((2, 80), (1, 80))}, "it holds device code (['compute_80', 'sm_80']), but its version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_wheel_is_refused(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(says)):
        check(tmp_path, **arguments)
