"""Every Python block of README.md and docs/ runs; the blocks of one file run in turn and share their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import fastgru

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name)
def test_every_python_block_runs(page: Path) -> None:
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


def test_every_page_is_in_the_site() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES[1:] if page.relative_to(ROOT / "docs").as_posix() not in listed]


def test_every_public_name_is_in_the_interface_page() -> None:
    listed = set(re.findall(r"^::: fastgru\.(?:[\w.]+\.)?_?(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert set(fastgru.__all__) == listed
