"""What README and docs say about speed comes from the stored results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up.
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    return module


def test_the_project_quotes_no_speed_that_is_not_stored(report: ModuleType) -> None:
    assert list(report.Report(ROOT).problems()) == []


MACHINE = {"cpu": "A CPU", "threads": 2, "isa": "avx2", "cuda_devices": [], "load_average": 0.1}
VERSIONS = {"fastgru": "0.1.0", "torch": "2.13.0", "triton": None}


def cpu_gru_record() -> dict[str, Any]:
    mode = {
        "us": {"fastgru": 1234.5, "nn.GRU": 2500.4},
        "speedup": {"nn.GRU": {"median": 2.03, "q1": 1.98, "q3": 2.07}},
        "gflops": 321.0,
        "of_fma_peak": 0.66,
    }
    return {
        "benchmark": "cpu_gru",
        "machine": MACHINE,
        "versions": VERSIONS,
        "commit": "0123456789ab",
        "threads": 2,
        "roofline": {"fma_peak_gflops": 486.4},
        "rows": [{"T": 64, "B": 32, "I": 128, "H": 256, "forward": mode, "training": mode}],
        "summary": {"forward beside nn.GRU": {"geometric_mean": 2.034, "worst": 2.03}},
    }


def cpu_attention_record() -> dict[str, Any]:
    row = {"B": 1, "H": 8, "Hk": 2, "Lq": 64, "Lk": 32, "D": 16, "causal": True, "mask": "", "dtype": "float32"}
    speedup = {"median": 1.61, "q1": 1.5, "q3": 1.7}
    row |= {"mode": "forward", "best": "torch flash", "speedup": {"torch flash": speedup}, "goal": 1.6}
    row |= {"us": {"fastgru": 1000.4, "torch flash": 1610.0}, "gflops": 99.0, "of_fma_peak": 0.8, "gb_per_s": 3.0}
    summary = {"forward": {"shapes": 3, "geometric_mean": 1.5, "worst": 0.9, "below_one": 1}}
    return {
        **{
            key: value for key, value in cpu_gru_record().items() if key in ("machine", "versions", "commit", "threads")
        },
        "benchmark": "cpu_attention",
        "table": {"rows": [row]},
        "sweep": {"rows": [], "summary": summary},
        "memory": {"rows": [{"mode": "forward", "L": 1024, "bytes": {"fastgru": 2**20, "torch math": 2**21}}]},
    }


def suite_record() -> dict[str, Any]:
    stats = {"median": 5e-6, "q1": 4e-6, "q3": 6e-6}
    ours = {"problem": "T1", "peer": "fastgru", "p90_us": 6.26, "p99_us": 9.0, "gflops": 12.3, "of_limit": 0.5}
    theirs = {"problem": "T1", "peer": "nn.GRU", "p90_us": 70.0, "gflops": 1.2, "of_limit": 0.049}
    ours |= {"limited_by": "memory", "peak_bytes": 3 << 19, "of_allowed_error": 0.3}
    items = [
        {"group": "GRU, forward, T1", "name": "a", "stats": stats, "extra_info": ours},
        {"group": "GRU, forward, T1", "name": "b", "stats": {**stats, "median": 6e-5}, "extra_info": theirs},
        # Without what this project's suite stores.
        {"group": "another", "name": "plain", "stats": stats, "extra_info": {}},
    ]
    limits = {"fma_peak_gflops": 500.2, "read_gb_per_s": {"16": 1.0}, "levels_gb_per_s": {"L1": 400.0}}
    machine = {"machine": "x86_64", "cpu": {"brand_raw": "A CPU"}, "versions": VERSIONS, "limits": {"cpu": limits}}
    return {"benchmarks": items, "machine_info": machine, "commit_info": {"id": "abc"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "benchmarks/results/cpu_gru.json").write_text(json.dumps(cpu_gru_record()))
    (tmp_path / "benchmarks/results/cpu_attention.json").write_text(json.dumps(cpu_attention_record()))
    (tmp_path / "benchmarks/results/suite.json").write_text(json.dumps(suite_record()))
    (tmp_path / "docs/performance.md").write_text("# Performance\n\n<!-- results:all --><!-- /results -->\n")
    (tmp_path / "README.md").write_text(
        "<!-- results:cpu_gru.picture --><!-- /results -->\n"
        "<!-- results:cpu_gru#summary/forward beside nn.GRU/geometric_mean:.1f -->9.9<!-- /results --> times as fast\n"
    )
    return tmp_path


def test_blocks_and_pictures_are_made_from_the_records(
    report: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = "\n".join(report.Report(root).problems())
    assert "README.md: a block of results is not up to date" in before
    assert "docs/performance.md: a block of results is not up to date" in before
    assert "is missing; run make report" in before

    report.Report(root).write(root / "build/report.html")
    assert list(report.Report(root).problems()) == []
    readme = (root / "README.md").read_text()
    assert "geometric_mean:.1f -->2.0<!-- /results --> times as fast" in readme
    (picture,) = (root / "docs/images").glob("cpu_gru-*.png")
    assert f"(docs/images/{picture.name})" in readme
    assert len(list((root / "docs/images").glob("suite-*.png"))) == 1
    page = (root / "docs/performance.md").read_text()
    assert f"(images/{picture.name})" in page
    assert "## The GRU on a CPU of 486 GFLOP/s" in page
    assert "| 64, 32, 128, 256 | 1,234 | 2,500 (2.03x, 1.98-2.07) | 321 | 66% |" in page
    assert (
        "|  |  | median, µs | quartiles, µs | 90 %, µs | 99 %, µs | GFLOP/s | of the limit | which is | peak, MB |"
        in page
    )
    assert "| T1 | fastgru | 5.0 | 4.0-6.0 | 6.3 | 9.0 | 12 | 50% | memory | 1.5 |" in page
    assert "| T1 | nn.GRU | 60.0 | 4.0-6.0 | 70.0 |  | 1 | 5% |  |  |" in page
    assert "| plain | 5.0 | 4.0-6.0 |" in page
    assert "| cpu | fma peak, GFLOP/s | 500 |\n| cpu | read from L1, GB/s | 400 |" in page
    speed = "| 1, 8/2, 64, 32, 16 causal | forward | float32 | 1,000 | 1,610 |  | 1.61x (1.50-1.70) | 1.6x |"
    assert f"{speed} 99 | 80% | 3 |" in page
    assert "| forward | 3 | 1.50x | 0.90x | 1 |" in page and "| forward | 1024 | 1.0 |  | 2.0 |" in page
    assert "A CPU" in page and "torch 2.13.0" in page and "triton" not in page
    html = (root / "build/report.html").read_text()
    assert '<td class="number">2,500 (2.03x, 1.98-2.07)</td>' in html and "data:image/png;base64," in html

    # Another result makes everything that quotes the old one out of date, the picture too.
    record = cpu_gru_record()
    record["summary"]["forward beside nn.GRU"]["geometric_mean"] = 3.0
    (root / "benchmarks/results/cpu_gru.json").write_text(json.dumps(record))
    after = "\n".join(report.Report(root).problems())
    assert "README.md: a block of results is not up to date" in after
    assert "is missing; run make report" in after


def test_a_page_of_one_record_touches_nothing_else(
    report: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = root / "build/mine.html"
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    record = str(root / "benchmarks/results/suite.json")
    monkeypatch.setattr(sys, "argv", ["report.py", "--show", record, "--page", str(page)])
    report.main()
    text = page.read_text()
    assert '<td class="number">60.0</td>' in text and text.count("data:image/png;base64,") == 1
    assert "9.9" not in text
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path != page} == before


@pytest.mark.parametrize(
    "prose",
    ["It is 2.5x faster.", "3 times as fast as nn.GRU", "a step takes 4.3 µs", "1,200 GFLOP/s", "40 % faster", "9 ms"],
)
def test_a_speed_in_prose_is_found(report: ModuleType, root: Path, prose: str) -> None:
    (root / "README.md").write_text(f"One\ntwo\n{prose}\n")
    (found,) = [problem for problem in report.Report(root).problems() if problem.startswith("README.md")]
    assert found.startswith("README.md:3: ")
    assert "is a speed that no block of results holds" in found


def test_prose_without_speeds_is_left_alone(report: ModuleType) -> None:
    for line in ("at most twice the error", "H = 256, 2 threads", "1e-5 of the largest", "16 units", "512 bits", "8x8"):
        assert not report.SPEED.search(line)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu_gru", "the stored results have no 'gpu_gru', only cpu_attention, cpu_gru, suite"),
        ("cpu_gru.backward", "the stored results have no 'backward', only summary, forward, training"),
        ("cpu_gru#summary/nothing:.2f", "the stored results have no 'nothing', only forward beside nn.GRU"),
    ],
)
def test_a_block_without_a_result_is_an_error(report: ModuleType, root: Path, name: str, says: str) -> None:
    (root / "README.md").write_text(f"<!-- results:{name} --><!-- /results -->\n")
    assert f"README.md: {says}" in list(report.Report(root).problems())


def test_an_unknown_record_is_refused(report: ModuleType, root: Path) -> None:
    (root / "benchmarks/results/other.json").write_text('{"benchmark": "other"}')
    with pytest.raises(
        SystemExit, match="neither of cpu_gru, cpu_attention, cpu_conditions, demo nor of pytest-benchmark, but 'other'"
    ):
        report.Report(root)
