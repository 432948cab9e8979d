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

from fastgru.backends import measured

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(GPU))
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("make_table", monkeypatch)


def entry(hidden: int, **contenders: dict[str, Any]) -> dict[str, Any]:
    sizes = {"H": hidden, "B": 8, "T": 256, "directions": 1, "training": True, "packed": False}
    return {"precision": "float16", **sizes, "contenders": contenders}


def test_the_table_has_what_every_card_measured_and_who_refused(make_table: Any) -> None:
    def took(us: float) -> dict[str, Any]:
        return {"device_us": us}

    refused = {"refused": "H is too large"}
    first = [
        entry(64, cuda=took(0.5), triton=took(1.0), cudnn=took(2.0)),
        entry(512, cuda=refused, triton=refused, cudnn=took(3.0)),
    ]
    second = [entry(64, cuda=refused, triton=took(1.5), cudnn=took(1.0)), entry(256, triton=took(4.004), cudnn=took(5))]
    results = [{"architecture": "sm_90", "entries": entries} for entries in (first, second)]
    want = [
        [64, 8, 256, 1, True, False, None, 1.5, 1.0],
        [64, 8, 256, 1, True, False, 0.5, 1.0, 2.0],
        [256, 8, 256, 1, True, False, None, 4.0, 5],
    ]
    assert make_table.rows(results) == {"sm_90": {"float16": want}}
    assert make_table.rows(results[::-1]) == {"sm_90": {"float16": want}}


def test_goals_name_the_worst_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("bench_gru", monkeypatch)

    def slope(precision: str, batch: int, **us: float) -> dict[str, Any]:
        sizes = {"H": 256, "B": batch, "T": 512, "directions": 1, "training": False, "packed": False}
        return {"precision": precision, **sizes, "contenders": {}, "us_per_step": us}

    entries = [
        slope("bfloat16", 32, cuda=0.9, triton=3.0, **{"nn.GRU": 9.0}),
        slope("float16", 32, cuda=0.5, **{"nn.GRU": 4.5}),
        slope("bfloat16", 1, triton=1.5, **{"nn.GRU": 9.0}),
    ]
    found = {goal["goal"]: goal for goal in bench.goals(entries)}
    first = found["us per step of forward, H=256, B<=32"]
    assert (first["worst"], first["of"], first["met"]) == (1.5, 2, False)
    # 4.5 / 0.9: against the best precision of nn.GRU.
    assert found["times nn.GRU, forward"]["worst"] == pytest.approx(5.0) and found["times nn.GRU, forward"]["met"]
    assert found["times nn.GRU, forward, packed"]["worst"] is found["times nn.GRU, forward, packed"]["met"] is None


def test_resources_of_the_kernels_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z3fwdv:
  REG:168 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:716 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    kernel = {"kernel": "_Z3fwdv", "architecture": "sm_90a", "registers": 168, "spills": 16, "static_shared": 0}
    assert script("build", monkeypatch).library_kernels(listing) == [kernel]


def test_the_table_survives_writing(make_table: Any, tmp_path: Path) -> None:
    shipped = measured.PATH.read_text()
    table = json.loads(shipped)
    make_table.write(table, tmp_path / "same.json")
    assert (tmp_path / "same.json").read_text() == shipped
    table["measured"] = {
        "sm_80": {"float16": [[1, 2, 3, 1, True, False, None, 4.5, 6.0]] * 2, "tf32": [[1] * 9]},
        "sm_90": {},
    }
    make_table.write(table, tmp_path / "more.json")
    assert json.loads((tmp_path / "more.json").read_text()) == table


def test_the_table_of_attention(make_table: Any) -> None:
    contenders = {"gluon": {"device_us": 3.0}, "triton": {"device_us": 4.0}, "sdpa": {"refused": "no"}}
    for name, time in (("gluon", 7.0), ("triton", 8.0)):
        contenders[name]["backward"] = {"device_us": time}
    entries = [{"precision": "bfloat16", "D": 128, "L": 1024, "causal": True, "contenders": contenders}]
    entries += [{**entries[0], "L": 2048, "contenders": {**contenders, "gluon": {"refused": "no"}}}]
    found = make_table.rows([{"architecture": "sm_90", "entries": entries}], "attention")
    assert found == {"sm_90": {"bfloat16": [[128, 1024, 1, 3.0, 4.0, 7.0, 8.0]]}}
    # As the backend reads it.
    path, names, times = make_table.TABLES["attention"]
    shipped = json.loads(path.read_text())
    assert shipped["columns"] == [*names, *(f"{name}_us" for name in times)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["build", "parity", "bench_gru", "bench_attention", "profile_gru"])
def test_a_stage_says_that_it_needs_a_gpu(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / f"{name}.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("this stage needs a GPU, and torch")
    assert not list(tmp_path.iterdir())
