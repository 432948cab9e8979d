"""The stages for a GPU, as far as they can be tried without one, and the table made from their results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgru.backends import gpu_table

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture
def make_table() -> Any:
    spec = importlib.util.spec_from_file_location("make_table", GPU / "make_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(hidden: int, triton: dict[str, Any], cudnn: float) -> dict[str, Any]:
    sizes = {"H": hidden, "B": 8, "T": 256, "directions": 1, "training": True, "packed": False}
    return {"precision": "float16", **sizes, "contenders": {"triton": triton, "cudnn": {"device_us": cudnn}}}


def test_the_table_keeps_the_worst_case_and_drops_refused_contenders(make_table: Any) -> None:
    first = [entry(64, {"device_us": 1.0}, 2.0), entry(512, {"refused": "breaks the numeric rule"}, 3.0)]
    second = [entry(64, {"device_us": 1.5}, 1.0), entry(256, {"device_us": 4.004}, 5.0)]
    results = [{"architecture": "sm_90", "entries": entries} for entries in (first, second)]
    want = [[64, 8, 256, 1, True, False, 1.5, 1.0], [256, 8, 256, 1, True, False, 4.0, 5.0]]
    assert make_table.rows(results) == {"sm_90": {"float16": want}}
    assert make_table.rows(results[::-1]) == {"sm_90": {"float16": want}}


def test_the_table_survives_writing(make_table: Any, tmp_path: Path) -> None:
    shipped = gpu_table.PATH.read_text()
    table = json.loads(shipped)
    make_table.write(table, tmp_path / "same.json")
    assert (tmp_path / "same.json").read_text() == shipped
    table["measured"] = {
        "sm_80": {"float16": [[1, 2, 3, 1, True, False, 4.5, 6.0]] * 2, "tf32": [[1] * 8]},
        "sm_90": {},
    }
    make_table.write(table, tmp_path / "more.json")
    assert json.loads((tmp_path / "more.json").read_text()) == table


def test_the_table_of_attention(make_table: Any) -> None:
    contenders = {"gluon": {"device_us": 3.0}, "triton": {"device_us": 4.0}, "sdpa": {"refused": "no"}}
    entries = [{"precision": "bfloat16", "D": 128, "L": 1024, "causal": True, "contenders": contenders}]
    entries += [{**entries[0], "L": 2048, "contenders": {**contenders, "gluon": {"refused": "no"}}}]
    found = make_table.rows([{"architecture": "sm_90", "entries": entries}], "attention")
    assert found == {"sm_90": {"bfloat16": [[128, 1024, 1, 3.0, 4.0]]}}
    # As the backend reads it.
    path, names, times = make_table.TABLES["attention"]
    shipped = json.loads(path.read_text())
    assert shipped["columns"] == [*names, *(f"{name}_us" for name in times)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["parity.py", "bench_attention.py"])
def test_a_stage_says_that_it_needs_a_gpu(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / script), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("this stage needs a GPU, and torch")
    assert not list(tmp_path.iterdir())
