"""Every Python block of README.md and docs/ runs, and every command that a text shows exists as it is shown.

The Python blocks of one file run in turn and share their names. Commands are looked for everywhere, in prose and in the
workflows too.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import fastgru
from fastgru.backends import registry
from fastgru.cli import bench, demo, info, verify

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / ".github/workflows").glob("*.yml"))]
# Variables that make takes, not all of which it must have a default for.
MAKE_VARIABLES = {"ARGS", "CUDA", "WITH", "TORCH", "PYTHON", "CXX", "CUDA_HOME"}


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name)
def test_every_python_block_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a block has the process use is undone.
    monkeypatch.setattr(registry, "_process", registry._process)
    blocks = list(Sybil(parsers=[PythonCodeBlockParser()], path=str(ROOT)).parse(page))
    assert len(blocks) == page.read_text().count("```python")
    for block in blocks:
        block.evaluate()


def test_a_block_that_fails_is_a_failure(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\ntext\n```python\nassert x == 2\n```\n")
    first, second = Sybil(parsers=[PythonCodeBlockParser()], path=str(tmp_path)).parse(page)
    first.evaluate()
    with pytest.raises(AssertionError):
        second.evaluate()


def command_options() -> dict[str, set[str]]:
    """The options of each command of the command line."""
    commands = argparse.ArgumentParser().add_subparsers()
    for module in (info, verify, bench, demo):
        module.add_parser(commands)
    return {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}


def wrong_commands(text: str) -> Iterator[str]:
    """What a text says of commands and is not so."""
    # A comment behind a command, and the end of code in prose, end it; a line that ends with a backslash goes on.
    text = re.sub(r"\\\n\s*", " ", text)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    for found in re.finditer(r"(?:^ {4}|^\s*- run: |`|&& )make((?: [^\s`#&)|]+)+)", text, re.MULTILINE):
        for word in shlex.split(found[1]):
            name, equals, _ = word.strip("[").partition("=")
            known = name in MAKE_VARIABLES if equals else name in targets or not re.fullmatch(r"[a-z]+", name)
            if not known:
                yield f"make has no {name}"
    options = command_options()
    for found in re.finditer(r"python -m fastgru ([a-z]+)\b([^\n`#|&]*)", text):
        if found[1] not in options:
            yield f"python -m fastgru has no {found[1]}"
            continue
        yield from (
            f"python -m fastgru {found[1]} has no {option}"
            for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", found[2])
            if option not in options[found[1]]
        )
    for found in re.finditer(r"python ((?:benchmarks|tools|examples)/[\w/]+\.py)([^\n`#|&]*)", text):
        path = ROOT / found[1]
        if not path.exists():
            yield f"there is no {found[1]}"
            continue
        # The stages for a GPU share some of theirs.
        source = path.read_text() + (ROOT / "benchmarks/gpu/stage.py").read_text()
        for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", found[2]):
            if f'"{option}"' not in source:
                yield f"{found[1]} has no {option}"
    extras = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for found in re.finditer(r"(?:fastgru|'\.)\[([a-z,]+)\]", text):
        yield from (f"there is no extra {name}" for name in found[1].split(",") if name not in extras)
    named = set(re.findall(r"FASTGRU_[A-Z_]+", text))
    yield from (f"nothing reads {name}" for name in sorted(named - variables_that_are_read()))


def variables_that_are_read() -> set[str]:
    """Environment variables that the package, its build and its tests look at."""
    read = set(re.findall(r"^export (FASTGRU_\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    sources = [
        ROOT / "setup.py",
        *(p for d in ("fastgru", "csrc", "tests", "kernels") for p in (ROOT / d).rglob("*.*")),
    ]
    for path in sources:
        if path.suffix in (".py", ".cpp", ".cu", ".h"):
            read |= set(re.findall(r'(?:environ(?:\.get\(|\[)|getenv\()\s*"(\w+)"', path.read_text()))
    return read | set(info.VARIABLES)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_every_command_that_is_shown_exists(text: Path) -> None:
    assert list(wrong_commands(text.read_text())) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("    make tests\n", "make has no tests"),
        ("run `make wheel CUDAS=13.0`.", "make has no CUDAS"),
        ("      - run: make docs bnech\n", "make has no bnech"),
        ("    python -m fastgru benchmark\n", "python -m fastgru has no benchmark"),
        ("    python -m fastgru bench --hiden 3 --seq 4\n", "python -m fastgru bench has no --hiden"),
        ("    python -m fastgru bench --seq 4 \\\n        --hiden 3\n", "python -m fastgru bench has no --hiden"),
        ("    python benchmarks/gru.py\n", "there is no benchmarks/gru.py"),
        ("    python benchmarks/cpu_gru.py --round 3   # --none\n", "benchmarks/cpu_gru.py has no --round"),
        ("    pip install '.[demo,peer]'\n", "there is no extra peer"),
        ("`pip install fastgru[demos]`", "there is no extra demos"),
        ("`FASTGRU_BACKENDS=cpu`", "nothing reads FASTGRU_BACKENDS"),
    ],
)
def test_a_command_that_does_not_exist_is_found(text: str, says: str) -> None:
    assert list(wrong_commands(text)) == [says]


def test_one_table_has_every_environment_variable() -> None:
    page = (ROOT / "docs/backends.md").read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(listed) == len(set(listed))
    assert not variables_that_are_read() - {*listed, "PATH"}
    own = {name for name in listed if name.startswith("FASTGRU_")}
    assert own <= variables_that_are_read()


def test_every_page_is_in_the_site() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES[1:] if page.relative_to(ROOT / "docs").as_posix() not in listed]


def test_every_public_name_is_in_the_interface_page() -> None:
    listed = set(re.findall(r"^::: fastgru\.(?:[\w.]+\.)?_?(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert set(fastgru.__all__) == listed
