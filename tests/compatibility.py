"""A pytest plugin: features and the tables of them in the docs, written from tests that ran.

A test marked ``@pytest.mark.feature(section, name)`` or ``(section, name, detail)`` is a line of a table; it may have
several marks. ``--feature-tables=DIR`` writes the tables. Those of docs/compatibility.md compare two kinds of modules:
the tests take the fixture ``rnn`` and then run on torch.nn too, where they may fail. That of docs/attention-features.md
has the section "Attention", and beside fastgru's column those of :mod:`tests.attention_peers`; fastgru's cell lists the
details whose tests passed.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastgru
from tests import attention_peers

ATTENTION = "Attention"


class RNN(NamedTuple):
    """The modules under test."""

    GRU: Any
    GRUCell: Any


KINDS = {"torch.nn": RNN(nn.GRU, nn.GRUCell), "fastgru": RNN(fastgru.GRU, fastgru.GRUCell)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--feature-tables", metavar="DIR", help="run features on torch.nn too, and write the tables")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(section, name, detail): a line of a table in the docs")
    path = config.getoption("--feature-tables")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(path)), "feature-tables")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rnn" in metafunc.fixturenames:
        ours: list[Any] = ["fastgru"]
        if metafunc.config.getoption("--feature-tables"):
            # What torch.nn lacks is what the table is to show.
            ours.append(pytest.param("torch.nn", marks=pytest.mark.xfail(strict=False)))
        metafunc.parametrize("rnn", ours, indirect=True)


def features(item: pytest.Item) -> list[tuple[str, str, str, str]]:
    """Section, name, detail and kind of every mark."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    kind = parameters.get("rnn", "fastgru")
    return [(*mark.args, *([""] if len(mark.args) == 2 else []), kind) for mark in item.iter_markers("feature")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        found = features(item)
        if found:
            item.user_properties.append(("features", found))


@pytest.fixture
def rnn(request: pytest.FixtureRequest) -> RNN:
    return KINDS[request.param]


class Table:
    """Collects the outcomes in the process that reports them, and writes them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # (section, name) -> its place in the source, and for each kind and detail the outcomes of its tests.
        self.places: dict[tuple[str, str], tuple[str, int]] = {}
        self.outcomes: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if not (report.when == "call" or (report.when == "setup" and not report.passed)):
            return
        for section, name, detail, kind in properties.get("features", ()):
            self.places.setdefault((section, name), (report.location[0], report.location[1] or 0))
            kinds = self.outcomes.setdefault((section, name), {})
            kinds.setdefault(kind, {}).setdefault(detail, []).append(outcome(report))

    def pytest_sessionfinish(self) -> None:
        about = (
            f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}, CPU. A dash: not run."
        )
        lines = [
            "# Compatibility",
            "",
            "What works with `GRU` and `GRUCell` of torch.nn and of fastgru, written by `make compat` from the tests",
            "that it ran, the same for both.",
            "",
            about,
            "",
        ]
        places = {key: place for key, place in self.places.items() if key[0] != ATTENTION}
        for section in dict.fromkeys(section for section, _ in sorted(places, key=places.__getitem__)):
            lines += [f"## {section}", "", "| feature | torch.nn | fastgru |", "|---|---|---|"]
            for key in sorted((key for key in places if key[0] == section), key=places.__getitem__):
                cells = [summary(self.outcomes[key].get(kind, {}).get("", [])) for kind in KINDS]
                lines.append(f"| {key[1]} | {' | '.join(cells)} |")
            lines.append("")
        if places:
            (self.folder / "compatibility.md").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
        if any(section == ATTENTION for section, _ in self.places):
            (self.folder / "attention-features.md").write_text(self.attention(about), encoding="utf-8")

    def attention(self, about: str) -> str:
        """The page of the attention table."""
        lines = [
            "# Attention: features",
            "",
            "fastgru's column is written by `make compat` from the tests that it ran: what stands there passed.",
            "The other columns say what those projects' sources and documentation say.",
            "",
            about,
            "",
            f"| | fastgru | {' | '.join(attention_peers.PEERS)} |",
            "|---" * (len(attention_peers.PEERS) + 2) + "|",
        ]
        for name, cells in attention_peers.CELLS.items():
            details = self.outcomes.get((ATTENTION, name), {}).get("fastgru", {})
            lines.append(attention_line(name, attention_cell(details), cells))
        return "\n".join(lines) + "\n\n" + attention_peers.SOURCES


def attention_line(name: str, ours: str, cells: list[str]) -> str:
    return f"| {name} | {ours} | {' | '.join(cells)} |"


def attention_cell(details: dict[str, list[str]]) -> str:
    """The details whose tests passed, in the order of their names; a failure instead, if there is one."""
    cells = {detail: summary(outcomes) for detail, outcomes in details.items()}
    failures = [f"{detail} {cell}".strip() for detail, cell in cells.items() if cell.startswith("no")]
    passed = sorted((d for d, cell in cells.items() if cell == "yes"), key=lambda d: (d.isdigit() and int(d), d))
    return "; ".join(failures) or ", ".join(detail or "✓" for detail in passed) or "-"


def outcome(report: pytest.TestReport) -> str:
    if report.passed:
        return "yes"
    if report.skipped and not hasattr(report, "wasxfail"):
        return "-"
    crash = getattr(report.longrepr, "reprcrash", None)
    return "no: " + (crash.message if crash else "an error")


def summary(outcomes: list[str]) -> str:
    """One cell: the first failure tells more than the passes beside it."""
    failures = [text for text in outcomes if text.startswith("no")]
    if not failures:
        return "yes" if "yes" in outcomes else "-"
    first = " ".join(failures[0].split()).replace("|", "\\|")
    return first if len(first) < 100 else first[:97] + "..."
