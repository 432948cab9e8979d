"""The source distribution, what setup.py decides, and how it says so."""

from __future__ import annotations

import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".md", ".typed", ".json", ".cubin")


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTGRU_", "PYTHONPATH"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In a copy: the build writes beside the sources, and another process may be building there.
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "site", "runs", "__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, ignore=skipped, dirs_exist_ok=True)
    for folder in ("tests/whitebox/build", "benchmarks/build"):
        (source / folder).mkdir()
        for left in ("lock", "probe.o", "probe.so"):
            (source / folder / left).touch()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(directory)!r})"
    run(sys.executable, "-c", code, cwd=source, FASTGRU_CUDA="0")
    (path,) = directory.glob("*.tar.gz")
    return path


def test_the_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "fastgru", "tests", "benchmarks", "docs", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCE_SUFFIXES and "build" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in inside
    assert {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"} <= inside
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc")) or "/build/" in name]


def test_every_file_of_the_package_is_shipped() -> None:
    tomllib = pytest.importorskip("tomllib")
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    for package, folder in setuptools["package-dir"].items():
        patterns = setuptools["package-data"].get(package, [])
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder).as_posix()
            if path.is_file() and path.suffix not in (".py", ".pyc", ".so"):
                assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), f"{package} does not ship {name}"


def test_the_sdist_installs_without_a_compiler_and_says_so(sdist: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    said = run(*pip, "--target", str(tmp_path / "site"), str(sdist), cwd=tmp_path, CXX="/nowhere/c++")
    assert "installing without the compiled extension: there is no C++ compiler ('/nowhere/c++' is not found" in said
    assert not list(tmp_path.rglob("*.so"))
    code = (
        "import torch, fastgru; fastgru.GRU(3, 4)(torch.randn(5, 2, 3)); print(fastgru.__file__, fastgru.__version__)"
    )
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site") in said
    assert said.count("RuntimeWarning") == 1
    assert "with the backend 'reference', because cpu: the compiled library" in said


def test_pip_installs_from_the_index_of_a_cuda_version(tmp_path: Path) -> None:
    for release, version in (("v0.1.0", "0.1.0"), ("v0.1.0", "0.1.0+cu130"), ("v0.2.0", "0.2.0+cu130")):
        wheel = tmp_path / "releases" / release / f"fastgru-{version}-py3-none-any.whl"
        wheel.parent.mkdir(parents=True, exist_ok=True)
        info = f"fastgru-{version}.dist-info"
        with zipfile.ZipFile(wheel, "w") as content:
            content.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fastgru\nVersion: {version}\n")
            content.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            content.writestr(f"{info}/RECORD", "")
    script = [sys.executable, str(ROOT / "tools/index.py")]
    run(*script, "releases", "whl", "--url", (tmp_path / "releases").as_uri(), cwd=tmp_path)
    pip = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-cache-dir"]
    for label, expected in (("cpu", "fastgru-0.1.0-"), ("cu130", "fastgru-0.2.0+cu130-")):
        index = (tmp_path / "whl" / label).as_uri()
        run(*pip, "--index-url", index, "--dest", label, "fastgru", cwd=tmp_path, PIP_CONFIG_FILE=os.devnull)
        (found,) = (tmp_path / label).iterdir()
        assert found.name.startswith(expected)
        assert '<a href="fastgru/">fastgru</a>' in (tmp_path / "whl" / label / "index.html").read_text()
    # The hash on the page is checked.
    (tmp_path / "releases/v0.1.0/fastgru-0.1.0-py3-none-any.whl").write_bytes(b"something else")
    index = (tmp_path / "whl/cpu").as_uri()
    with pytest.raises(AssertionError, match="DO NOT MATCH THE HASHES"):
        run(*pip, "--index-url", index, "--dest", "again", "fastgru", cwd=tmp_path, PIP_CONFIG_FILE=os.devnull)


def setup_py() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"))


def test_the_record_of_a_build_names_no_folder_and_the_commit_of_this_repository_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build_record = setup_py()["build_record"]
    monkeypatch.chdir(ROOT)
    inside = Path(build_record(tmp_path / "new")).read_text()
    assert "-ffp-contract=off" in inside and f'"torch": "{torch.__version__}"' in inside
    assert str(ROOT) not in inside and str(tmp_path) not in inside
    # As in a source distribution unpacked in somebody's repository.
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    assert '"commit": null' in Path(build_record(Path("other"))).read_text()


def test_architectures_become_compiler_options() -> None:
    flags = setup_py()["code_flags"]
    assert flags("8.0;9.0a 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: 'sm_90' is not like 8.0, 9.0a or 10.0\+PTX"):
        flags("8.0;sm_90")


@pytest.mark.parametrize(("jobs", "at_a_time"), [("1", 1), ("3", 3)])
def test_kernels_are_compiled_for_the_architectures_asked_for_and_so_many_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: str, at_a_time: int
) -> None:
    # A compiler that counts how many of it run while it does.
    running = tmp_path / "running"
    running.mkdir()
    nvcc = tmp_path / "home/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release 12.6, V12.6.1" && exit\necho "$@" >> {tmp_path}/lines\n'
        f"touch {running}/$$\nsleep 0.5\nls {running} | wc -l >> {tmp_path}/counts\nsleep 0.5\nrm {running}/$$\n"
    )
    nvcc.chmod(0o755)
    compile_kernels = setup_py()["compile_kernels"]
    monkeypatch.setitem(compile_kernels.__globals__, "KERNELS", [Path(f"csrc/cuda/{name}.cu") for name in "abc"])
    monkeypatch.setenv("MAX_JOBS", jobs)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    objects = compile_kernels(tmp_path / "home", tmp_path / "out", ["/headers"])
    assert objects == [str(tmp_path / f"out/csrc/cuda/{name}.o") for name in "abc"]
    assert max(map(int, (tmp_path / "counts").read_text().split())) == at_a_time
    lines = (tmp_path / "lines").read_text().splitlines()
    assert len(lines) == 3
    # CUDA 12.6 knows nothing of 10.0.
    assert all("code=sm_80" in line and "code=compute_90 " in line and "100" not in line for line in lines)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    compile_kernels(tmp_path / "home", tmp_path / "out", [])
    assert "code=sm_100 " in (tmp_path / "lines").read_text().splitlines()[-1]


def test_the_cuda_part_is_asked_for_or_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = setup_py()
    cuda_home = names["cuda_home"]
    for folder, file in (("bin", "nvcc"), ("include", "cuda_runtime.h")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for value, expected in (("1", tmp_path), ("0", None), ("", tmp_path if torch.version.cuda else None)):
        monkeypatch.setenv("FASTGRU_CUDA", value)
        assert cuda_home() == expected
    monkeypatch.setenv("FASTGRU_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTGRU_CUDA must be 0 or 1, not 'yes'"):
        cuda_home()
    monkeypatch.setitem(cuda_home.__globals__, "find_toolkit", lambda: None)
    monkeypatch.setenv("FASTGRU_CUDA", "1")
    with pytest.raises(SystemExit, match="there is no CUDA toolkit with an nvcc; CUDA_HOME can name one"):
        cuda_home()
    monkeypatch.setenv("FASTGRU_CUDA", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_home() is None
    assert "The CUDA part is left out" in capsys.readouterr().out


def test_the_default_architectures_are_those_that_the_toolkit_knows() -> None:
    architectures = setup_py()["architectures"]
    assert architectures("13.0") == architectures("12.8") == architectures("12.10") == "8.0;9.0a;10.0+PTX"
    assert architectures("12.4") == architectures("12.0") == "8.0;9.0a;9.0+PTX"
    with pytest.raises(SystemExit, match=r"CUDA 11\.8 is older than 12\.0"):
        architectures("11.8")
    text = (ROOT / "docs/install.md").read_text()
    assert not [names for names in setup_py()["ARCHITECTURES"].values() if f"`{names}`" not in text]


def test_a_toolkit_that_is_named_is_the_only_one_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for home in ("on_path", "named"):
        for folder, file in (("bin", "nvcc"), ("include", "cuda_runtime.h")):
            (tmp_path / home / folder).mkdir(parents=True)
            (tmp_path / home / folder / file).touch(mode=0o755)
    find_toolkit = setup_py()["find_toolkit"]
    monkeypatch.setenv("PATH", str(tmp_path / "on_path/bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert find_toolkit() == tmp_path / "on_path"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert find_toolkit() == tmp_path / "named"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert find_toolkit() is None


def test_the_variables_that_builds_read_are_documented() -> None:
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', (ROOT / "setup.py").read_text()))
    text = (ROOT / "docs/backends.md").read_text() + (ROOT / "docs/install.md").read_text()
    assert {"FASTGRU_CUDA", "CUDA_HOME", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"} <= read
    assert not [name for name in read if f"`{name}`" not in text]
