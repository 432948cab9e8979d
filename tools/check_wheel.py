"""Check wheels as a user would meet them; the first finding ends the run with its reason.

    python tools/check_wheel.py dist/*.whl [--with python3.10=2.10.0 ...]

The file: name, version and tag agree with the metadata; one library and the module beside it, nothing vendored, no
search path; auditwheel finds no symbol newer than the tag promises. In the library torch-abi-audit finds nothing
outside torch's stable ABI, and nothing that torch 2.10 lacks, and there is no CPython symbol at all; in the module
there is none of torch, and abi3audit finds nothing outside the limited ABI of CPython 3.10. twine accepts the
metadata; PyPI takes the size. A CUDA wheel holds machine code, and PTX for GPUs that are newer than it.

The installation: for each ``--with PYTHON=TORCH`` (default: this interpreter and its torch) a fresh environment with
that torch and one wheel alone runs `python -m fastgru verify` from an empty directory. A CUDA wheel passes it on a
machine without a GPU and with a CPU build of torch, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import torch
from elftools.elf.elffile import ELFFile
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from torch_abi_audit import inspect_extension

OLDEST_TORCH = Version("2.10")
LIBRARY = "fastgru/_C.so"
MODULE = "fastgru/_direct.abi3.so"
OLDEST_PYTHON = "3.10"
# Of one file, unless PyPI is asked for more. Wheels with a local version are kept elsewhere and may be larger.
PYPI_BYTES = 100 * 10**6
# torch's libraries, and what every system has. All else, libcuda and libcudart included, must not be needed to load.
NEEDED = re.compile(r"lib(c10|torch|torch_cpu|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux-.*")

# Runs in the fresh environment: the compiled library must be there and used, not fallen back from.
PROBE = """
import sys, torch, fastgru
with fastgru.use_backend("cpu"):
    fastgru.GRU(3, 4)(torch.randn(5, 2, 3))
    fastgru.flash_attention(*torch.randn(3, 1, 2, 5, 8))
assert fastgru.__version__ == sys.argv[1], fastgru.__version__
assert fastgru._library.direct is not None, fastgru._library.direct_error
cuda = fastgru.__version__.partition("+cu")[2]
try:
    built = torch.ops.fastgru.cuda_versions()[0]
    assert f"{built // 1000}{built // 10 % 100}" == cuda, (built, cuda)
    from fastgru.backends import gluon
    for entry in gluon.manifest().values():
        assert (gluon.CUBINS / entry["file"]).read_bytes()[:4] == b"\x7fELF", entry["file"]
except NotImplementedError:
    assert not cuda, "the CUDA part is missing"
"""


def check(condition: bool, wheel: Path, message: str) -> None:
    """End the run unless ``condition`` holds."""
    if not condition:
        raise SystemExit(f"{wheel.name}: {message}")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; when it fails, the run ends with that."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTGRU_", "PYTHON"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def check_names(wheel: Path, content: zipfile.ZipFile) -> None:
    """The file's name says what the metadata say, and the content is the package and one library."""
    _, version, _, tags = parse_wheel_filename(wheel.name)
    (info,) = {name.partition("/")[0] for name in content.namelist() if name.partition("/")[0].endswith(".dist-info")}
    metadata = HeaderParser().parsestr(content.read(f"{info}/METADATA").decode())
    check(metadata["Version"] == str(version), wheel, f"the metadata say version {metadata['Version']}")
    tagged = HeaderParser().parsestr(content.read(f"{info}/WHEEL").decode()).get_all("Tag")
    check(sorted(tagged) == sorted(map(str, tags)), wheel, f"the metadata say tags {tagged}")
    for tag in tags:
        check((tag.interpreter, tag.abi) == ("py3", "none"), wheel, f"{tag} is not for every Python 3")
        check(tag.platform.startswith("manylinux_2_28_"), wheel, f"{tag} is not for manylinux_2_28")
    requirements = metadata.get_all("Requires-Dist") or []
    runtime = [line for line in requirements if "extra ==" not in line]
    check(runtime == ["torch>=2.10"], wheel, f"it requires {runtime}, not torch alone")
    libraries = [name for name in content.namelist() if ".so" in Path(name).name or ".libs/" in name]
    check(sorted(libraries) == [LIBRARY, MODULE], wheel, f"it holds {libraries}, not {LIBRARY} and {MODULE} alone")
    # auditwheel adds the folders themselves.
    cubins = {name for name in content.namelist() if name.startswith("fastgru/cubins/") and not name.endswith("/")}
    listed = set()
    if cubins:
        kernels = json.loads(content.read("fastgru/cubins/manifest.json"))["kernels"]
        listed = {"fastgru/cubins/manifest.json", *(f"fastgru/cubins/{one['file']}" for one in kernels.values())}
    check(cubins == listed, wheel, f"its manifest lists {sorted(listed)} and it holds {sorted(cubins)}")
    check(
        bool(cubins) == ("+cu" in str(version)),
        wheel,
        "kernels compiled ahead belong into a CUDA wheel, and only there",
    )
    packages = ("", "attention/", "attention_sm90/", "gru/")
    inits = [f"fastgru/kernels/{package}__init__.py" for package in packages]
    for name in (*inits, "fastgru/py.typed", f"{info}/licenses/LICENSE"):
        check(name in content.namelist(), wheel, f"it lacks {name}")


def device_code(elf: ELFFile) -> set[str]:
    """The architectures that the library holds code for, such as sm_80 (machine code) and compute_100 (PTX).

    nvcc puts the code of each file into the section .nv_fatbin: a header (magic number, version, its own size, the size
    of what follows), then for each architecture a header (kind, -, its own size, the size of the code, ...; the eighth
    32-bit number is the architecture) and the code.
    """
    section = elf.get_section_by_name(".nv_fatbin")
    data = section.data() if section else b""
    found, at = set(), 0
    while (at := data.find(b"\x50\xed\x55\xba", at)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        at, end = at + header, at + header + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            found.add(f"{ {1: 'compute', 2: 'sm'}[kind] }_{architecture}")
            at += header + size
    return found


def undefined(wheel: Path, elf: ELFFile) -> list[str]:
    """The symbols that a library or module finds in others, which are among those that every system has, or torch."""
    dynamic = list(elf.get_section_by_name(".dynamic").iter_tags())
    needed = [tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"]
    foreign = [name for name in needed if not NEEDED.fullmatch(name)]
    check(not foreign, wheel, f"it needs {foreign} to load")
    paths = [tag.entry.d_tag for tag in dynamic if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    check(not paths, wheel, f"{paths} names folders of the machine it was built on")
    return [s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] == "SHN_UNDEF"]


def check_module(wheel: Path, module: Path) -> None:
    """What the module needs is in every Python from the oldest on."""
    with module.open("rb") as file:
        symbols = undefined(wheel, ELFFile(file))
    foreign = [name for name in symbols if re.match(r"aoti_|torch|_ZNK?(2at|3c10|5torch)|cuda|cu[A-Z]", name)]
    check(not foreign, wheel, f"{MODULE} needs {foreign}, which are not Python's")
    run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", "--assume-minimum-abi3", OLDEST_PYTHON, module)
    print(f"  abi3: nothing outside the limited ABI of Python {OLDEST_PYTHON}", flush=True)


def check_library(wheel: Path, library: Path) -> None:
    """What the library needs to load is in every torch from the oldest on and in every system."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        code = device_code(elf)
        symbols = undefined(wheel, elf)
    private = [name for name in symbols if re.match(r"_?Py|cuda|cu[A-Z]", name)]
    check(not private, wheel, f"it needs {private}, which not every Python and every machine has")
    found = inspect_extension(library).torch
    check(found.stable, wheel, f"outside torch's stable ABI: {found.unstable_symbols}")
    check(not found.unknown_shim_symbols, wheel, f"torch-abi-audit does not know {found.unknown_shim_symbols}")
    least = Version(found.min_torch_version)
    check(least <= OLDEST_TORCH, wheel, f"{found.version_defining_symbols} need torch {least}")
    print(f"  stable ABI: {found.stable_shim_count} functions of torch, all in {least}", flush=True)
    if parse_wheel_filename(wheel.name)[1].local:
        kinds = {name.partition("_")[0] for name in code}
        check(kinds == {"sm", "compute"}, wheel, f"its device code is {sorted(code)}, not machine code and PTX")
        print(f"  device code: {', '.join(sorted(code))}", flush=True)
    else:
        check(not code, wheel, f"it holds device code ({sorted(code)}), but its version names no CUDA")


def check_file(wheel: Path) -> None:
    """Everything that can be told without installing."""
    size = wheel.stat().st_size
    fits = size <= PYPI_BYTES or parse_wheel_filename(wheel.name)[1].local is not None
    check(fits, wheel, f"{size:,} bytes are more than the {PYPI_BYTES:,} that PyPI takes")
    print(f"  {size:,} bytes", flush=True)
    with zipfile.ZipFile(wheel) as content, tempfile.TemporaryDirectory() as directory:
        check_names(wheel, content)
        check_library(wheel, Path(content.extract(LIBRARY, directory)))
        check_module(wheel, Path(content.extract(MODULE, directory)))
    shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    tags = [int(minor) for minor in re.findall(r'"manylinux_2_(\d+)_', shown)]
    check(bool(tags) and max(tags) <= 28, wheel, f"auditwheel: {shown}")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    print("  auditwheel and twine: accepted", flush=True)


def check_installed(wheels: list[Path], python: str, version: str) -> None:
    """Install each wheel alone, beside torch ``version``, and verify it from another directory."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        interpreter = directory / "venv/bin/python"
        run(python, "-m", "venv", directory / "venv")
        run(interpreter, "-m", "pip", "install", "--quiet", f"torch=={version}")
        exact = run(interpreter, "-c", "import platform, torch; print(platform.python_version(), torch.__version__)")
        (directory / "empty").mkdir()
        print(f"Python, torch {exact.splitlines()[-1]}", flush=True)
        for wheel in wheels:
            # No index: what the wheel needs beyond torch would be missing.
            run(interpreter, "-m", "pip", "install", "--quiet", "--no-index", wheel.resolve())
            local = parse_wheel_filename(wheel.name)[1]
            run(interpreter, "-c", PROBE, str(local), cwd=directory / "empty")
            printed = run(interpreter, "-m", "fastgru", "verify", cwd=directory / "empty")
            print(f"  {wheel.name}: {printed.splitlines()[-1]}", flush=True)
            # The next one must bring everything itself.
            run(interpreter, "-m", "pip", "uninstall", "--quiet", "--yes", "fastgru")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--with",
        dest="pairs",
        nargs="+",
        default=[f"{sys.executable}={torch.__version__.partition('+')[0]}"],
        metavar="PYTHON=TORCH",
        help="interpreters and versions of torch to install with; default: those that run this",
    )
    options = parser.parse_args()
    pairs = [pair.partition("=")[::2] for pair in options.pairs]
    for python, version in pairs:
        if shutil.which(python) is None or not version:
            parser.error(f"--with: {python}={version} is not an interpreter and a version of torch")
    for wheel in options.wheels:
        print(wheel, flush=True)
        check_file(wheel)
    for python, version in pairs:
        check_installed(options.wheels, python, version)


if __name__ == "__main__":
    main()
