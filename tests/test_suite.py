"""The benchmark suite: what it checks, what it stores, and what it does without a peer. No times are judged here."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is missing: pip install 'fastgru[bench]'")

import checks
import memory
import peers_gru
import roofline
from peers import PeerMissingError
from problems import Attention, Problem

ROOT = Path(__file__).resolve().parents[1]
SMALL = Problem(3, 2, 4, 5)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run over one problem leaves, with ONNX Runtime and Keras as if they were not installed."""
    directory = tmp_path_factory.mktemp("suite")
    for name in ("onnxruntime", "keras"):
        (directory / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
    path = directory / "out.json"
    command = ["benchmarks", "-q", "-rs", "-p", "no:cacheprovider", "-k", "T1-B1-I128 and not compile"]
    options = ["--benchmark-max-time=0.02", f"--benchmark-json={path}"]
    code = f"import sys; sys.path.insert(0, {str(directory)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    # In a worker of xdist pytest-benchmark would do nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {"said": done.stdout, **json.loads(path.read_text())}


def test_a_run_stores_percentiles_limits_and_errors_and_names_who_is_missing(record: dict[str, Any]) -> None:
    found = {(item["group"], item["extra_info"]["peer"]): item for item in record["benchmarks"]}
    forward, training = (f"GRU, {kind}, cpu, float32, T1-B1-I128-H128" for kind in ("forward", "forward + backward"))
    for group in (forward, training):
        for peer in ("fastgru", "nn.GRU"):
            item = found[group, peer]
            stored, stats = item["extra_info"], item["stats"]
            assert stats["iterations"] == 1
            assert stored["p50_us"] == pytest.approx(stats["median"] * 1e6)
            kept = [p for p in (50, 90, 99) if stats["rounds"] * (100 - p) >= 100]
            assert [p for p in (50, 90, 99) if f"p{p}_us" in stored] == kept
            ordered = [stored[f"p{p}_us"] for p in kept]
            assert ordered == sorted(ordered) and ordered[-1] <= stats["max"] * 1.001e6
            assert 0 < stored["of_allowed_error"] <= 1
            assert stored["gflops"] > 0 and stored["of_limit"] > 0 and stored["limited_by"] == "memory"
    assert (forward, "Keras") not in found and (forward, "ONNX Runtime") not in found
    assert re.search(r"SKIPPED \[\d+\] .*: Keras: pip install keras", record["said"])
    assert "ONNX Runtime: pip install onnx onnxruntime" in record["said"]
    limits = record["machine_info"]["limits"]["cpu"]
    assert limits["fma_peak_gflops"] > 1 and limits["levels_gb_per_s"]["DRAM"] > 0.1
    assert record["machine_info"]["versions"]["torch"] == torch.__version__
    assert "node" not in record["machine_info"]
    assert len(json.dumps(record)) < 50_000


@pytest.mark.parametrize("peer", list(peers_gru.FORWARD))
def test_every_forward_peer_computes_the_same(peer: str) -> None:
    case = checks.GruCase(SMALL)
    try:
        function = peers_gru.FORWARD[peer](case.gru, case.x)
    except PeerMissingError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        assert case.check(peer, function) <= 1
        # A stub of the right shape is not mistaken for it.
        with pytest.raises(checks.WrongNumbersError, match="nothing is timed"):
            case.check(peer, lambda: torch.as_tensor(function()) * 1.001)


@pytest.mark.parametrize("peer", list(peers_gru.TRAINING))
def test_every_training_peer_computes_every_gradient(peer: str) -> None:
    case = checks.GruCase(SMALL)
    try:
        step = peers_gru.TRAINING[peer](case.gru, case.x, case.grad)
    except PeerMissingError as error:
        pytest.skip(str(error))
    assert case.check_gradients(peer, step) <= 1
    for wrong in range(len(step())):
        scaled = [grad * (1.001 if i == wrong else 1) for i, grad in enumerate(step())]
        with pytest.raises(checks.WrongNumbersError):
            case.check_gradients(peer, lambda scaled=scaled: tuple(scaled))


def test_nan_is_wrong_and_ours_is_held_to_the_rule() -> None:
    exact, theirs = [torch.ones(4, dtype=torch.float64)], [torch.ones(4) + 1e-6]
    error = theirs[0] + 2e-6
    with pytest.raises(checks.WrongNumbersError):
        checks.compare([error], theirs, exact, ours=True, multiple=2)
    assert checks.compare([error], theirs, exact, ours=False, multiple=2) < 1
    with pytest.raises(checks.WrongNumbersError):
        checks.compare([torch.full((4,), math.nan)], theirs, exact, ours=False, multiple=2)


def test_attention_is_checked_on_one_row_of_the_batch_where_all_take_gigabytes() -> None:
    assert checks.AttentionCase(Attention(2, 1, 3, 5, 4))._checked == 2
    assert checks.AttentionCase(Attention(3, 16, 4096, 4096, 1))._checked == 1
    case = checks.AttentionCase(Attention(2, 1, 3, 5, 4))
    with pytest.raises(checks.WrongNumbersError):
        case.check("torch", lambda: torch.nn.functional.scaled_dot_product_attention(*case.inputs) * 1.001)


LIMITS = {
    "fma_peak_gflops": 100.0,
    "bf16_peak_gflops": 200.0,
    "read_gb_per_s": {"16": 80.0, "256": 40.0, "65536": 10.0},
}


def test_a_limit_is_the_longer_of_arithmetic_and_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "roofline", lambda threads: LIMITS)
    # One row: 2 x 128 KiB of recurrent weights per core and step, read at 40 GB/s; the input's product at 100 GFLOP/s.
    streaming = roofline.gru_limit(Problem(10, 1, 64, 148), "cpu", "float32", 2, training=False)
    assert streaming.by == "memory"
    assert streaming.seconds == pytest.approx(10 * 12 * 148**2 / 40e9 + 10 * 6 * 64 * 148 / 100e9)
    batch = roofline.gru_limit(Problem(10, 64, 64, 148), "cpu", "float32", 2, training=True)
    assert batch.by == "compute"
    assert batch.seconds == pytest.approx(3 * 6 * 10 * 64 * 148 * (64 + 148) / 100e9)
    # Decoding reads the keys and values: 2 x 32 x 8 x 512 x 64 numbers and the queries, from memory.
    shape = Attention(32, 8, 1, 512, 64)
    decoding = roofline.attention_limit(shape, "cpu", "bfloat16", 2, training=False)
    assert decoding == (pytest.approx(2 * 32 * 8 * (1 + 2 * 512) * 64 / 10e9), "memory")
    long = roofline.attention_limit(Attention(1, 8, 1024, 1024, 64), "cpu", "bfloat16", 2, training=True)
    assert long == (pytest.approx(14 * 8 * 1024**2 * 64 / 200e9), "compute")


def test_the_probes_measure_this_machine() -> None:
    library = roofline.probes()
    one, two = (library.read_bandwidth(1, kib * 1024, 0.01) for kib in (16, 65536))
    if one == 0:
        pytest.skip("no probe for this processor")
    # Between what is far below any such processor and far above.
    assert 1e8 < two < one * 3 and one < 1e13
    assert 1e8 < library.fma_peak(1, 0.01) < 1e13
    assert set(roofline.caches()) <= {"L1", "L2", "L3", "L4"}


@pytest.mark.parametrize("peer", ["fastgru", "nn.GRU"])
def test_peak_memory_is_at_least_that_of_the_gradients(peer: str) -> None:
    problem = Problem(64, 64, 256, 256)
    written = 4 * 64 * 64 * 256  # the output, float32
    assert written < memory.peak_bytes("gru", peer, problem, 1) < 100 * written
