"""Only what pyproject.toml cannot say: the compiled extension."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern))


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


def extension() -> dict[str, Any]:
    """setup()'s arguments for the extension: a plain library in the stable ABI, one file for every Python and torch."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def get_ext_filename(self, ext_name: str) -> str:
            return os.path.join(*ext_name.split(".")) + ".so"

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"fastgru: {error}. The compiler's messages are above; FASTGRU_NO_EXTENSION=1 installs without it."
                ) from error

    module = CppExtension(
        "fastgru._C",
        SOURCES,
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_no_extension()
if reason is not None:
    print(f"fastgru: installing without the compiled extension: {reason}", flush=True)
setup(**({} if reason is not None else extension()))
