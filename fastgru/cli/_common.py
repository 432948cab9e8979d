"""Holds what the commands share: errors meant for the user, option types, tables, JSON files."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgru import backends
from fastgru.cli import _machine

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class CommandError(Exception):
    """A request that cannot be carried out; the message is all the user sees (exit code 2)."""


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run; says on stderr when ``auto`` had to fall back, and turns bad settings into errors."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            name = backends.select("gru", device, dtype).name
            _machine.current_isa()
        except (ValueError, backends.BackendUnavailable) as error:
            raise CommandError(str(error)) from None
    for note in notes:
        print(f"Note: {note.message}", file=sys.stderr)
    return name


def require(command: str, *modules: str) -> None:
    """Import ``modules`` of the ``demo`` extra, or say how to get them."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(module)
    if missing:
        raise CommandError(
            f"'{command}' needs {' and '.join(missing)}, which the 'demo' extra installs: pip install 'fastgru[demo]'"
        )


def positive(text: str) -> int:
    """An argparse type: a size or a count, from 1 to a million."""
    return _whole(text, 1, 10**6)


def seed(text: str) -> int:
    """An argparse type: what torch takes as a seed."""
    return _whole(text, 0, 2**63 - 1)


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {value}")
    return value


def seconds(text: str) -> float:
    """An argparse type: a time above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def device(text: str) -> torch.device:
    """An argparse type: a device that this machine has (``cpu``, ``cuda``, ``cuda:1``)."""
    try:
        result = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; try cpu or cuda") from None
    if result.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise argparse.ArgumentTypeError("no CUDA device: this torch is a CPU build, or no GPU is visible")
        if result.index is not None and result.index >= count:
            raise argparse.ArgumentTypeError(f"no device {text!r}: {count} CUDA device(s), numbered from 0")
    elif result.type != "cpu":
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; use cpu or cuda")
    return result


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table, with rich where it is installed and as plain text where not.

    ``right`` lists the columns that are aligned to the right.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
        print(f"\n{title}")
        head = [columns, ["-" * width for width in widths]] if any(columns) else []
        for line in (*head, *rows):
            cells = [
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    # A pipe has no width: let the table be as wide as it wants instead of folding it at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=max(80, _natural_width(columns, rows)))
    console.print(table)


_STYLES = {"PASS": "green", "FAIL": "bold red", "available": "green"}


def _natural_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    widths = (max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns)))
    return sum(width + 3 for width in widths) + 2


def check_writable(path: Path) -> None:
    """Create ``path`` and its folder if they are missing: better to fail now than after the work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path``; NaN and infinity become strings, which JSON lacks."""
    path.write_text(to_json(record) + "\n", encoding="utf-8")


def to_json(record: dict[str, Any]) -> str:
    """``record`` as strict JSON."""
    return json.dumps(_finite(record), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
