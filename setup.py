"""Only what pyproject.toml cannot say: the compiled extension, with or without its CUDA part."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

CUDA = Path("csrc/cuda")
PYTHON = Path("csrc/python")
SOURCES = [path for path in sorted(Path("csrc").rglob("*.cpp")) if not {CUDA, PYTHON} & {*path.parents}]
CUDA_SOURCES = sorted(CUDA.rglob("*.cpp"))
KERNELS = sorted(CUDA.rglob("*.cu"))
HEADERS = [str(path) for pattern in ("*.h", "*.cuh") for path in sorted(Path("csrc").rglob(pattern))]
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
COMPILE_ARGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
# By the CUDA version from which on they are known, newest first.
ARCHITECTURES = {"12.8": "8.0;9.0a;10.0+PTX", "12.0": "8.0;9.0a;9.0+PTX"}


def why_no_extension() -> str | None:
    """None when the extension can be built, else the reason it is left out."""
    if os.environ.get("FASTGRU_NO_EXTENSION", "0") not in ("", "0"):
        return "FASTGRU_NO_EXTENSION is set"
    if not SOURCES:
        return "csrc holds no sources"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed here (install it first, then fastgru with --no-build-isolation)"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler!r} is not found; set CXX to name another)"
    return None


def find_toolkit() -> Path | None:
    """The CUDA toolkit of this machine: CUDA_HOME alone, or the one whose nvcc is on the path, else the usual place."""
    nvcc, named = shutil.which("nvcc"), os.environ.get("CUDA_HOME")
    homes = [named] if named else [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in map(Path, filter(None, homes)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit to compile csrc/cuda with, or None to leave the CUDA part out.

    FASTGRU_CUDA=1 asks for it, 0 leaves it out; unset, it comes when torch is a CUDA build and there is a toolkit.
    """
    import torch

    wanted = os.environ.get("FASTGRU_CUDA") or ("auto" if torch.version.cuda else "0")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"fastgru: FASTGRU_CUDA must be 0 or 1, not {wanted!r}")
    home = None if wanted == "0" else find_toolkit()
    if home is None and wanted != "0":
        message = "fastgru: there is no CUDA toolkit with an nvcc; CUDA_HOME can name one"
        if wanted == "1":
            raise SystemExit(message)
        print(f"{message}. The CUDA part is left out", flush=True)
    return home


def cuda_version(home: Path) -> str:
    """The toolkit's version, such as 13.0."""
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise SystemExit(f"fastgru: {home / 'bin/nvcc'} does not tell its version: {text}")
    return found[1]


def architectures(version: str) -> str:
    """What to compile for by default with the CUDA toolkit ``version``: those that the kernels are made for."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    for known_from, names in ARCHITECTURES.items():
        if numbers(version) >= numbers(known_from):
            return names
    raise SystemExit(
        f"fastgru: CUDA {version} is older than {known_from}, the oldest that knows compute capability 9.0a"
    )


def code_flags(architectures: str) -> list[str]:
    """nvcc's options for a list in torch's notation: ``9.0a`` is machine code, ``10.0+PTX`` brings PTX as well."""
    flags = []
    for item in architectures.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if found is None:
            raise SystemExit(f"fastgru: TORCH_CUDA_ARCH_LIST: {item!r} is not like 8.0, 9.0a or 10.0+PTX")
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_kernels(home: Path, directory: Path, include_dirs: list[str]) -> list[str]:
    """Compile every .cu, MAX_JOBS at a time (default: one per processor), and return the objects."""
    command = [str(home / "bin/nvcc"), "-c", "-O3", "-std=c++17", "-DUSE_CUDA"]
    command += [f"-D{name}={value}" for name, value in MACROS]
    command += [f"-I{path}" for path in include_dirs]
    command += code_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(cuda_version(home)))
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    if os.environ.get("CXX"):
        command += ["-ccbin", os.environ["CXX"]]

    def compile_one(source: Path) -> str:
        target = directory / source.with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        line = [*command, str(source), "-o", str(target)]
        print(shlex.join(line), flush=True)
        subprocess.run(line, check=True)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, KERNELS))


def compile_cubins(directory: Path) -> None:
    """The attention kernels for Hopper, by the one Triton that tools/build_cubins.py takes; left out where there is
    another or none, unless FASTGRU_CUBINS=1 asks for them."""
    command = [sys.executable, "tools/build_cubins.py", "--out", str(directory)]
    if subprocess.run(command, check=False).returncode:
        if os.environ.get("FASTGRU_CUBINS", "0") not in ("", "0"):
            raise SystemExit("fastgru: FASTGRU_CUBINS is set, and the attention kernels for Hopper cannot be compiled")
        print("fastgru: the attention kernels for Hopper are left out", flush=True)


def build_record(directory: Path) -> str:
    """Write the C++ source of ``fastgru_build_record``, which says in JSON how the library was built; return its path.

    A file of its own, so that a new commit compiles nothing else again.
    """
    import torch

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    # A source distribution unpacked inside somebody's repository is not part of that repository.
    head = git("rev-parse", "--short=12", "HEAD") if git("ls-files", "setup.py") else ""
    dirty = "+dirty" if head and git("status", "--porcelain", "--untracked-files=no") else ""
    record = {"flags": shlex.join(COMPILE_ARGS), "torch": torch.__version__, "commit": head + dirty or None}
    target = directory / "build_record.cpp"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        '#ifdef __clang__\n#define COMPILER __VERSION__\n#else\n#define COMPILER "GCC " __VERSION__\n#endif\n'
        'extern "C" __attribute__((visibility("default"))) const char* fastgru_build_record() {\n'
        f"""  return R"({{"compiler": ")" COMPILER R"(", {json.dumps(record)[1:]})";\n}}\n"""
    )
    return str(target)


def extension() -> dict[str, Any]:
    """setup()'s arguments for what is compiled: a plain library in the stable ABI, one file for every Python and torch,
    and the small module in Python's limited ABI that calls it directly."""
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.egg_info import egg_info
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    home = cuda_home()

    class Build(BuildExtension):
        def get_ext_filename(self, ext_name: str) -> str:
            *folders, name = ext_name.split(".")
            return os.path.join(*folders, name + (".abi3.so" if name == "_direct" else ".so"))

        def build_extensions(self) -> None:
            try:
                module = self.extensions[0]
                module.sources.append(build_record(Path(self.build_temp)))
                if home is not None:
                    module.extra_objects = compile_kernels(home, Path(self.build_temp), module.include_dirs)
                    compile_cubins(Path(self.get_ext_fullpath(module.name)).parent / "cubins")
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"fastgru: {error}. The compiler's messages are above; FASTGRU_NO_EXTENSION=1 installs without it."
                ) from error

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    class Info(egg_info):
        def finalize_options(self) -> None:
            # The local version says which CUDA: 0.1.0+cu130.
            self.tag_build = "+cu" + cuda_version(home).replace(".", "")
            super().finalize_options()

    module = CppExtension(
        "fastgru._C",
        [str(path) for path in (SOURCES if home is None else SOURCES + CUDA_SOURCES)],
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=MACROS,
        libraries=["dl"],
        # Messages name a source file, and not where it lay on the machine that built it.
        extra_compile_args=[*COMPILE_ARGS, f"-fmacro-prefix-map={Path.cwd()}/="],
        py_limited_api=True,
    )
    direct = Extension(
        "fastgru._direct",
        [str(path) for path in sorted(PYTHON.rglob("*.cpp"))],
        depends=HEADERS,
        include_dirs=[*module.include_dirs],
        extra_compile_args=module.extra_compile_args,
        language="c++",
        py_limited_api=True,
    )
    commands = {"build_ext": Build, "bdist_wheel": Wheel}
    arguments: dict[str, Any] = {"ext_modules": [module, direct], "cmdclass": commands}
    if home is not None:
        module.include_dirs.append(str(home / "include"))
        module.library_dirs += [str(path) for path in (home / "lib64", home / "lib") if path.is_dir()]
        module.libraries[:0] = ["cudart_static", "rt", "pthread"]  # before dl, which they need
        module.depends += [str(path) for path in KERNELS]
        arguments["cmdclass"]["egg_info"] = Info
    return arguments


def main() -> None:
    reason = why_no_extension()
    if reason is not None:
        print(f"fastgru: installing without the compiled extension: {reason}", flush=True)
    setup(**({} if reason is not None else extension()))


if __name__ == "__main__":
    main()
