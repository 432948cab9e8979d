"""The checks of a wheel refuse what they are there to refuse. `make wheel` runs these first; they need its tools."""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
import zipfile
from pathlib import Path

import pytest

for tool in ("auditwheel", "elftools", "torch_abi_audit", "twine"):
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
CODE = 'extern "C" int aoti_torch_abi_version(); int f() { return aoti_torch_abi_version(); }\n'


def check(
    directory: Path, name: str = "fastgru-0.1.0", code: str = "", flags: tuple[str, ...] = (), **more: str
) -> None:
    """Check a small wheel with a library made of ``code`` and of one call of torch; ``more`` replaces or adds files."""
    source, library = directory / "code.cpp", directory / "_C.so"
    source.write_text(CODE + code)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-shared", "-fPIC", *flags, str(source), "-o", str(library)], check=True)
    files = {
        "METADATA": METADATA,
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{PLATFORM}\n",
        "RECORD": "fastgru/_C.so,,\n",  # auditwheel looks at what is listed
        "licenses/LICENSE": "",
    }
    files = {f"fastgru-0.1.0.dist-info/{file}": text for file, text in {**files, **more}.items() if "so" not in file}
    files |= {"fastgru/py.typed": "", "fastgru/kernels/__init__.py": ""}
    files |= {file: text for file, text in more.items() if "so" in file}
    wheel = directory / (name if name.endswith(".whl") else f"{name}-py3-none-{PLATFORM}.whl")
    with zipfile.ZipFile(wheel, "w") as content:
        content.write(library, "fastgru/_C.so")
        for file, text in files.items():
            content.writestr(file, text)
    CHECK["check_file"](wheel)


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    check(tmp_path)


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
        ({"fastgru.libs/libcudart.so.13": ""}, "not fastgru/_C.so alone"),
        ({"flags": ("-Wl,-rpath,/somewhere",)}, "names folders of the machine it was built on"),
        ({"code": call("PyLong_AsLong")}, "it needs ['PyLong_AsLong']"),
        ({"code": call("cudaFree")}, "it needs ['cudaFree']"),
        ({"code": "namespace c10 { int h(); } int g() { return c10::h(); }"}, "torch's stable ABI: ('c10::h()'"),
        ({"code": call("torch_from_blob")}, "('torch_from_blob',) need torch 2.11"),
        ({"code": call("aoti_torch_nothing")}, "torch-abi-audit does not know ('aoti_torch_nothing',)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_wheel_is_refused(tmp_path: Path, arguments: dict[str, str], says: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(says)):
        check(tmp_path, **arguments)
