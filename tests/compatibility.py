"""A pytest plugin: features that are checked on fastgru and, for the table in the docs, on torch.nn as well.

A test marked ``@pytest.mark.feature(section, name)`` takes the fixture ``rnn``. With ``--compatibility-table=PATH`` it
runs on torch.nn too, where it may fail, and the outcomes are written to PATH as a table.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastgru


class RNN(NamedTuple):
    """The modules under test."""

    GRU: Any
    GRUCell: Any


KINDS = {"torch.nn": RNN(nn.GRU, nn.GRUCell), "fastgru": RNN(fastgru.GRU, fastgru.GRUCell)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility-table", metavar="PATH", help="run features on torch.nn too, and write the table")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(section, name): a line of the compatibility table")
    path = config.getoption("--compatibility-table")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(path)), "compatibility-table")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rnn" in metafunc.fixturenames:
        ours: list[Any] = ["fastgru"]
        if metafunc.config.getoption("--compatibility-table"):
            # What torch.nn lacks is what the table is to show.
            ours.append(pytest.param("torch.nn", marks=pytest.mark.xfail(strict=False)))
        metafunc.parametrize("rnn", ours, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("feature")
        if marker is not None:
            kind = item.callspec.params["rnn"]  # type: ignore[attr-defined]
            item.user_properties.append(("feature", (*marker.args, kind)))


@pytest.fixture
def rnn(request: pytest.FixtureRequest) -> RNN:
    return KINDS[request.param]


class Table:
    """Collects the outcomes in the process that reports them, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # (section, name) -> its place in the source, and for each kind the outcomes of its tests.
        self.places: dict[tuple[str, str], tuple[str, int]] = {}
        self.outcomes: dict[tuple[str, str], dict[str, list[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if "feature" not in properties or not (report.when == "call" or (report.when == "setup" and not report.passed)):
            return
        section, name, kind = properties["feature"]
        self.places[section, name] = (report.location[0], report.location[1] or 0)
        self.outcomes.setdefault((section, name), {}).setdefault(kind, []).append(outcome(report))

    def pytest_sessionfinish(self) -> None:
        lines = [
            "# Compatibility",
            "",
            "What works with `GRU` and `GRUCell` of torch.nn and of fastgru, written by `make compat` from the tests",
            "that it ran, the same for both.",
            "",
            f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}, CPU. A dash: not run.",
            "",
        ]
        for section in dict.fromkeys(section for section, _ in sorted(self.places, key=self.places.__getitem__)):
            lines += [f"## {section}", "", "| feature | torch.nn | fastgru |", "|---|---|---|"]
            names = sorted((key for key in self.places if key[0] == section), key=self.places.__getitem__)
            for key in names:
                cells = [summary(self.outcomes[key].get(kind, [])) for kind in KINDS]
                lines.append(f"| {key[1]} | {' | '.join(cells)} |")
            lines.append("")
        self.path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


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
