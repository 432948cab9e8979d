"""Everything the project says about speed, made from benchmarks/results/*.json and from nothing else.

    python benchmarks/report.py            # writes the page, the pictures, and the blocks in README.md and docs/
    python benchmarks/report.py --check    # fails when a block is not what the results say, or prose quotes a speed
    python benchmarks/report.py --show build/benchmarks.json    # the page of this record alone, and nothing else

A block is what stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``. NAME is a record, which is the name
of its file without ``.json`` (all of its section), ``record.table`` (one of its tables), ``record.picture``, ``all``
(every section), or one number in a sentence: ``record#path/to/number:.2f``, the keys separated by slashes, then
Python's format. A picture's name carries a hash of its record, so that a block with an old picture is out of date too.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgru.cli import _report

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- results:(?P<name>.+?) -->)(?P<text>.*?)(<!-- /results -->)", re.DOTALL)
# A speed in prose: a factor, a time per call, a rate. What is fast or slow is said by a block.
SPEED = re.compile(
    r"\b\d[\d.,]*\s?(?:x\b|\u00d7|times (?:as fast|faster)|% (?:faster|slower|of peak)|[mµμnu]s\b"
    r"|microseconds|milliseconds|[GT]FLOP|[GT]i?B/s|(?:steps|tokens|characters|char)/s)"
)


@dataclass
class Section:
    """What one record says: named tables (columns and rows), sentences, and how to draw it (as PNG)."""

    title: str
    tables: dict[str, _report.Table]
    draw: Callable[[], bytes] | None = None
    remarks: list[str] = field(default_factory=list)


def cpu_gru(record: dict[str, Any]) -> Section:
    """The record of benchmarks/cpu_gru.py."""
    machine, versions = record["machine"], record["versions"]
    tables: dict[str, _report.Table] = {
        "summary": (
            ["fastgru", "geometric mean", "worst shape"],
            [[k, f"{v['geometric_mean']:.2f}x", f"{v['worst']:.2f}x"] for k, v in record["summary"].items()],
        )
    }
    for mode in ("forward", "training"):
        names = list(record["rows"][0][mode]["us"])
        rows = []
        for row in record["rows"]:
            result = row[mode]
            cells = [", ".join(str(row[size]) for size in "TBIH")]
            for name in names:
                ratio = result["speedup"].get(name)
                spread = f" ({ratio['median']:.2f}x, {ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else ""
                cells.append(f"{result['us'][name]:,.0f}{spread}")
            limit = f"{result['of_bandwidth']:.0%}" if "of_bandwidth" in result else ""
            rows.append([*cells, f"{result['gflops']:.0f}", f"{result['of_fma_peak']:.0%}", limit])
        tables[mode] = (["T, B, I, H", *names, "GFLOP/s", "of FMA peak", "of bandwidth"], rows)
        if mode == "training":
            tables[mode] = ([*tables[mode][0][:-1]], [row[:-1] for row in rows])

    def draw() -> bytes:
        # Beside this file. It brings the peers, which a check of the texts does without.
        from cpu_gru import plot

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "picture.png")
            plot(record, path)
            return path.read_bytes()

    peak = record["roofline"]["fma_peak_gflops"]
    return Section(
        # Two processors may go by one name.
        f"The GRU on a CPU of {peak:.0f} GFLOP/s",
        tables,
        draw,
        [
            "Microseconds per call, float32, medians; in brackets how many times as fast fastgru is, with quartiles. "
            "Forward is inference; training is forward and backward to every gradient.",
            "Of bandwidth: where one row is computed at a time, how much of the speed at which the caches can be read, "
            "together with the product of the input at the peak of multiply-adds.",
            f"Measured on {machine['cpu']}, {record['threads']} thread(s), instruction set {machine['isa']}, with "
            f"{_versions(versions)}, at commit {record['commit']}.",
        ],
    )


def cpu_attention(record: dict[str, Any]) -> Section:
    """The record of benchmarks/cpu_attention.py."""
    tables: dict[str, _report.Table] = {}
    if "table" in record:
        rows = []
        for row in record["table"]["rows"]:
            heads = f"{row['H']}/{row['Hk']}" if row["H"] != row["Hk"] else str(row["H"])
            shape = ", ".join(str(size) for size in (row["B"], heads, row["Lq"], row["Lk"], row["D"]))
            ratio = row["speedup"][row["best"]]
            rows.append(
                [
                    shape + (" causal" if row["causal"] else ""),
                    row["mode"],
                    row["dtype"],
                    *(f"{row['us'][name]:,.0f}" if name in row["us"] else "" for name in _ATTENTION_PEERS),
                    f"{ratio['median']:.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})",
                    "" if row["goal"] is None else f"{row['goal']:.1f}x",
                    f"{row['gflops']:.0f}",
                    f"{row['of_fma_peak']:.0%}",
                    f"{row['gb_per_s']:.0f}",
                ]
            )
        columns = ["B, H, Lq, Lk, D", "mode", "dtype", *_ATTENTION_PEERS, "beside the better", "goal"]
        tables["speed"] = ([*columns, "GFLOP/s", "of float32 FMA peak", "GB/s"], rows)
    if "sweep" in record:
        tables["random shapes"] = (
            ["beside the better", "shapes", "geometric mean", "worst", "slower"],
            [
                [mode, str(v["shapes"]), f"{v['geometric_mean']:.2f}x", f"{v['worst']:.2f}x", str(v["below_one"])]
                for mode, v in record["sweep"]["summary"].items()
            ],
        )
    if "memory" in record:
        tables["peak memory"] = (
            ["mode", "length", *(f"{name}, MB" for name in _ATTENTION_PEERS)],
            [
                [
                    row["mode"],
                    str(row["L"]),
                    *(f"{row['bytes'][n] / 2**20:.1f}" if n in row["bytes"] else "" for n in _ATTENTION_PEERS),
                ]
                for row in record["memory"]["rows"]
            ],
        )
    return Section(
        "Attention on a CPU",
        tables,
        None,
        [
            "Microseconds per call, medians; beside the better of torch's backends, flash and math, with "
            "quartiles. Forward is inference; training is forward and backward. The peak is that of float32 "
            "multiply-adds, measured beside each row; products of bfloat16 may exceed it. GB/s: query, key, value and "
            "output, once each, by the time.",
            "Random shapes draw B to 8, up to 32 heads, also grouped, lengths to 1024, D to 128, causal or not, with "
            "and without masks, float32 and bfloat16. Memory is the peak of one call in float32 with one head and 64 "
            "columns, its tensors included, beyond what the process held before.",
            f"Measured on {record['machine']['cpu']}, {record['threads']} thread(s), instruction set "
            f"{record['machine']['isa']}, with {_versions(record['versions'])}, at commit {record['commit']}.",
        ],
    )


_ATTENTION_PEERS = ("fastgru", "torch flash", "torch math")


def cpu_conditions(record: dict[str, Any]) -> Section:
    """The record of benchmarks/cpu_conditions.py."""

    def shape(row: dict[str, Any]) -> str:
        return ", ".join(str(row[size]) for size in "TBIH")

    modes = ("forward", "training")
    tables: dict[str, _report.Table] = {}
    if "sweep" in record:
        summary = record["sweep"]["summary"]
        tables["random shapes"] = (
            ["beside nn.GRU", "shapes", "geometric mean", "worst", "slower than nn.GRU"],
            [
                [
                    mode,
                    str(len(record["sweep"]["rows"])),
                    f"{summary[mode]['geometric_mean']:.2f}x",
                    f"{summary[mode]['worst']:.2f}x",
                    str(summary[mode]["below_one"]),
                ]
                for mode in modes
            ],
        )
    if "memory" in record:
        names = list(record["memory"]["rows"][0]["bytes"])
        tables["peak memory of training"] = (
            ["T, B, I, H", *(f"{name}, MB" for name in names)],
            [
                [shape(row), *(f"{row['bytes'][name] / 2**20:.1f}" for name in names)]
                for row in record["memory"]["rows"]
            ],
        )
    if "bf16" in record:
        tables["bfloat16 beside fastgru's float32"] = (
            ["T, B, I, H", *modes],
            [[shape(row), *(f"{row[mode]['speedup']:.2f}x" for mode in modes)] for row in record["bf16"]["rows"]],
        )
    if "neighbour" in record:
        tables["a busy process on one core"] = (
            ["T, B, I, H", *(f"{name}, {mode}" for mode in modes for name in ("fastgru", "nn.GRU"))],
            [
                [shape(row), *(f"{row[mode][name]:.2f}x" for mode in modes for name in ("fastgru", "nn.GRU"))]
                for row in record["neighbour"]["rows"]
            ],
        )
    return Section(
        "The GRU on a CPU, other conditions",
        tables,
        None,
        [
            "Random shapes draw T to 256, B to 128, I and H to 1024, one to three layers, one or two directions, "
            "packed or not. Memory is the peak of training steps beyond what the process held before. With a busy "
            "process: mean time per call over the mean without it.",
            f"Measured on {record['machine']['cpu']}, {record['threads']} thread(s), with "
            f"{_versions(record['versions'])}, at commit {record['commit']}.",
        ],
    )


def demo(record: dict[str, Any]) -> Section:
    """The record of ``python -m fastgru demo``."""
    return Section(
        "Training a language model, twice",
        {"speed": _report.speed_table(record), "checks": _report.check_table(record), "facts": _report.facts(record)},
        lambda: _report.draw(record),
        _report.remarks(record),
    )


# What the suite stores of a result beside its times: heading, factor, format.
SUITE_COLUMNS = {
    "p90_us": ("90 %, µs", 1, ",.1f"),
    "p99_us": ("99 %, µs", 1, ",.1f"),
    "device_us": ("device, µs", 1, ",.1f"),
    "host_us": ("submitted in, µs", 1, ",.1f"),
    "gflops": ("GFLOP/s", 1, ",.0f"),
    "of_limit": ("of the limit", 1, ".0%"),
    "limited_by": ("which is", None, ""),
    "peak_bytes": ("peak, MB", 2**-20, ",.1f"),
}
UNITS = {"_gb_per_s": "GB/s", "_gflops": "GFLOP/s", "_tflops": "TFLOP/s"}


def suite(record: dict[str, Any]) -> Section:
    """What pytest-benchmark stores: a table for each kind of problem."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for item in record["benchmarks"]:
        problem = item["extra_info"].get("problem", "")
        kinds.setdefault((item["group"] or "benchmarks").removesuffix(f", {problem}"), []).append(item)
    tables: dict[str, _report.Table] = {}
    for kind, items in kinds.items():
        extra = [name for name in SUITE_COLUMNS if any(name in item["extra_info"] for item in items)]
        rows = [
            [
                item["extra_info"].get("problem", ""),
                _peer(item),
                f"{item['stats']['median'] * 1e6:,.1f}",
                f"{item['stats']['q1'] * 1e6:,.1f}-{item['stats']['q3'] * 1e6:,.1f}",
                *(_suite_cell(name, item["extra_info"]) for name in extra),
            ]
            for item in items
        ]
        columns = ["", "", "median, µs", "quartiles, µs", *(SUITE_COLUMNS[name][0] for name in extra)]
        # Without problems their column is empty.
        first = 0 if any(row[0] for row in rows) else 1
        tables[kind] = (columns[first:], [row[first:] for row in rows])
    machine, commit = record["machine_info"], record["commit_info"]
    remarks = [
        f"Measured on {machine.get('cpu', {}).get('brand_raw', machine['machine'])}, "
        + (f"with {_versions(machine['versions'])}, " if "versions" in machine else "")
        + f"at commit {commit.get('id')}."
    ]
    if machine.get("limits"):
        tables["limits, probed in the same run"] = _limits(machine["limits"])
        remarks.insert(
            0,
            "Of the limit: how near a result comes to the time in which the products can be computed at the peak of "
            "multiply-adds, or the data be read, whichever takes longer. 90 % and 99 %: what that part of the calls "
            "takes at most; left out where too few calls were made to say.",
        )
    drawn = {
        kind: {(item["extra_info"]["problem"], _peer(item)): item["stats"]["median"] for item in items}
        for kind, items in kinds.items()
        if all("problem" in item["extra_info"] for item in items)
    }
    return Section("Benchmark suite", tables, (lambda: _draw_suite(drawn)) if drawn else None, remarks)


def _peer(item: dict[str, Any]) -> str:
    return str(item["extra_info"].get("peer") or (item.get("params") or {}).get("peer", item["name"]))


def _suite_cell(name: str, values: dict[str, Any]) -> str:
    _, factor, form = SUITE_COLUMNS[name]
    if name not in values:
        return ""
    return str(values[name]) if factor is None else format(values[name] * factor, form)


def _limits(limits: dict[str, Any]) -> _report.Table:
    """What was probed on the CPU and on the GPU, the reads by level of cache."""
    rows = []
    for where, probed in limits.items():
        for name, value in probed.items():
            if name == "levels_gb_per_s":
                rows += [[where, f"read from {level}, GB/s", f"{rate:,.0f}"] for level, rate in value.items()]
            elif not isinstance(value, dict):
                tail = next(tail for tail in UNITS if name.endswith(tail))
                quantity = name.removesuffix(tail).replace("_", " ")
                rows.append([where, f"{quantity}, {UNITS[tail]}", f"{value:,.0f}"])
    return ["", "limit", ""], rows


def _draw_suite(kinds: dict[str, dict[tuple[str, str], float]]) -> bytes:
    """How many times as fast as each peer fastgru is, a panel for each kind of problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everyone = dict.fromkeys(peer for medians in kinds.values() for _, peer in medians)
    colours = {peer: f"C{i}" for i, peer in enumerate(peer for peer in everyone if peer != "fastgru")}
    heights = [1 + 0.14 * len(medians) for medians in kinds.values()]
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (kind, medians) in zip(axes[:, 0], kinds.items(), strict=True):
        problems = list(dict.fromkeys(problem for problem, _ in medians))
        peers = list(dict.fromkeys(peer for _, peer in medians if peer != "fastgru"))
        height = 0.84 / max(1, len(peers))
        for i, peer in enumerate(peers):
            places = [
                p for p, problem in enumerate(problems) if {(problem, peer), (problem, "fastgru")} <= set(medians)
            ]
            ratios = [medians[problems[p], peer] / medians[problems[p], "fastgru"] for p in places]
            offset = (i - (len(peers) - 1) / 2) * height
            rows = [p + offset for p in places]
            axis.barh(rows, [ratio - 1 for ratio in ratios], height * 0.9, left=1, label=peer, color=colours[peer])
            for row, ratio in zip(rows, ratios, strict=True):
                axis.annotate(
                    f"{ratio:.2f}", (max(ratio, 1), row), (3, 0), textcoords="offset points", va="center", fontsize=6
                )
        axis.set_title(kind, loc="left", fontsize=10)
        axis.set_yticks(range(len(problems)), problems, fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.axvline(1, color="0.3", linewidth=1)
        axis.margins(x=0.1, y=0.01)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1, 0].set_xlabel("times as fast as the peer (medians of blocks that ran one after the other)")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=110, format="png")
        plt.close(figure)
        return buffer.getvalue()


def _versions(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def section(record: dict[str, Any]) -> Section:
    """The section of a record, by what it is."""
    if "benchmarks" in record:
        return suite(record)
    kinds = {"cpu_gru": cpu_gru, "cpu_attention": cpu_attention, "cpu_conditions": cpu_conditions, "demo": demo}
    kind = record.get("benchmark") or record.get("command")
    if kind not in kinds:
        raise SystemExit(f"a stored result is neither of {', '.join(kinds)} nor of pytest-benchmark, but {kind!r}")
    return kinds[kind](record)


class Report:
    """The stored results below ``root``, and the texts that quote them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "docs/images"
        self.files = {path.stem: path for path in sorted((root / "benchmarks/results").glob("*.json"))}
        self.records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.sections = {name: section(record) for name, record in self.records.items()}

    def texts(self) -> list[Path]:
        """The files that may quote results."""
        return [self.root / "README.md", *sorted((self.root / "docs").rglob("*.md"))]

    def picture(self, name: str) -> Path:
        """Where the picture of a record belongs."""
        return self.images / f"{name}-{hashlib.sha256(self.files[name].read_bytes()).hexdigest()[:8]}.png"

    def block(self, name: str, text: Path) -> str:
        """What stands in the block ``name`` of the file ``text``."""
        if name == "all":
            parts = [f"## {part.title}\n\n{self._section(record, text)}" for record, part in self.sections.items()]
            return _lines("\n\n".join(parts) or "No results are stored yet.")
        record, hash_sign, rest = name.partition("#")
        if hash_sign:
            path, _, form = rest.partition(":")
            value: Any = self._known(self.records, record)
            for key in path.split("/"):
                value = value[int(key)] if isinstance(value, list) else self._known(value, key)
            return format(value, form)
        record, _, part = name.partition(".")
        found = self._known(self.sections, record)
        if not part:
            return _lines(self._section(record, text))
        if part == "picture" and found.draw is not None:
            return _lines(self._picture(record, text))
        return _lines(_markdown(self._known(found.tables, part)))

    def _known(self, choices: dict[str, Any], name: str) -> Any:
        if name not in choices:
            raise KeyError(f"the stored results have no {name!r}, only {', '.join(choices) or 'nothing'}")
        return choices[name]

    def _picture(self, record: str, text: Path) -> str:
        # README.md is read at the root, the pages in their folder.
        folder = self.images.relative_to(text.parent).as_posix()
        return f"![{self.sections[record].title}]({folder}/{self.picture(record).name})"

    def _section(self, record: str, text: Path) -> str:
        part = self.sections[record]
        pictures = [self._picture(record, text)] if part.draw else []
        tables = [f"**{_caption(name)}**\n\n{_markdown(table)}" for name, table in part.tables.items()]
        return "\n\n".join([*pictures, *tables, *part.remarks])

    def updated(self, text: Path) -> str:
        """The file with every block as the results say."""
        content = text.read_text(encoding="utf-8")
        return BLOCK.sub(lambda m: m[1] + self.block(m["name"], text) + m[4], content)

    def problems(self) -> Iterator[str]:
        """What in the texts does not come from the results."""
        for text in self.texts():
            name, content = text.relative_to(self.root), text.read_text(encoding="utf-8")
            try:
                if self.updated(text) != content:
                    yield f"{name}: a block of results is not up to date; run make report"
            except KeyError as error:
                yield f"{name}: {error.args[0]}"
            # Blanked, not removed, so that the numbers of the lines stay.
            prose = BLOCK.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), content)
            for number, line in enumerate(prose.splitlines(), 1):
                for found in SPEED.finditer(line):
                    yield f"{name}:{number}: {found[0]!r} is a speed that no block of results holds"
        for record, part in self.sections.items():
            if part.draw is not None and not self.picture(record).exists():
                yield f"{self.picture(record).relative_to(self.root)} is missing; run make report"

    def write(self, page: Path) -> None:
        """Draw the pictures, bring the texts up to date and write the page."""
        self.images.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for record, part in self.sections.items():
            for old in self.images.glob(f"{record}-????????.png"):
                old.unlink()
            if part.draw is not None:
                pictures[record] = part.draw()
                self.picture(record).write_bytes(pictures[record])
        for text in self.texts():
            text.write_text(self.updated(text), encoding="utf-8")
        write_page(page, [(part, pictures.get(record)) for record, part in self.sections.items()])


def write_page(page: Path, parts: list[tuple[Section, bytes | None]]) -> None:
    """Write sections and their pictures (as PNG) as one file that needs nothing else."""
    body = []
    for part, picture in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        if picture is not None:
            body.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
        for name, table in part.tables.items():
            body += [f"<h3>{html.escape(_caption(name))}</h3>", _report.html_table(table, _numeric(table))]
        body += [f"<p>{html.escape(line)}</p>" for line in part.remarks]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>fastgru: measured</title>'
        f"<style>{_report.STYLE}</style></head>\n<body>\n<h1>fastgru: measured</h1>\n"
        + ("\n".join(body) or "<p>No results are stored yet.</p>")
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _lines(text: str) -> str:
    """A block of its own needs an empty line on both sides, or Markdown takes it for part of the comment."""
    return f"\n\n{text}\n\n"


def _numeric(table: _report.Table) -> list[int]:
    """The columns that hold numbers only."""
    columns, rows = table
    return [i for i in range(len(columns)) if all(row[i][:1].isdigit() or not row[i] for row in rows)]


def _caption(name: str) -> str:
    return name[0].upper() + name[1:]


def _markdown(table: _report.Table) -> str:
    columns, rows = table
    rule = ["---:" if i in _numeric(table) else "---" for i in range(len(columns))]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in [columns, rule, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something would change")
    parser.add_argument("--page", type=Path, default=ROOT / "build/report.html", help="default: build/report.html")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="write the page of these records alone")
    options = parser.parse_args()
    if options.show:
        parts = [section(json.loads(path.read_text(encoding="utf-8"))) for path in options.show]
        write_page(options.page, [(part, part.draw and part.draw()) for part in parts])
        print(options.page)
        return
    report = Report(ROOT)
    if not options.check:
        report.write(options.page)
        print(options.page)
    problems = list(report.problems())
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
