"""The command line: info, verify, bench, the timing they share, and what users get wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgru
from fastgru import testing
from fastgru.cli import _bench_attention, _common, _machine, _timing, bench, info, main, verify

SMALL_BENCH = ["bench", "--hidden", "8", "5", "--input", "4", "--batch", "2", "--seq", "3", "--seconds", "0.01"]

SMALL_ATTENTION = [
    "bench", "--family", "attention", "--batch", "1", "--heads", "4", "--kv-heads", "2", "--seq", "5", "--dim", "8",
    "--seconds", "0.01",
]  # fmt: skip


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fastgru`` as a user does, in a folder that is not the source tree."""
    return subprocess.run(
        [sys.executable, "-m", "fastgru", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, extra, None)


@pytest.fixture
def one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"gru": (testing.GruProblem(T=2, B=2, I=3, H=5),), "attention": (testing.AttentionProblem(),)}
    monkeypatch.setattr(verify, "PROBLEMS", problems)


@pytest.fixture
def wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def parity(problem: verify.Problem) -> list[testing.Comparison]:
        return [testing.Comparison("output", 0.0, 1.0, 0.0), testing.Comparison("grad of hx", float("nan"), 1.0, 0.0)]

    for name in ("parity", "attention_parity"):
        monkeypatch.setattr(testing, name, parity)


# --- info


def test_info_names_every_backend_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in ("fastgru", torch.__version__, "cpu", "reference", "available", *info.VARIABLES):
        assert expected in text


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {
        "schema", "command", "versions", "commit", "machine", "backends", "chosen", "environment", "problems",
    }  # fmt: skip
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert {backend["name"] for backend in record["backends"]} >= {"cpu", "reference"}
    assert record["problems"] == []


def test_info_says_how_the_library_was_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = _machine.build()
    if _machine.usable_isas():
        assert build is not None and set(build) == {"compiler", "flags", "torch", "commit"}
        assert "-ffp-contract=off" in (build["flags"] or "") and build["compiler"] and build["torch"]
        assert main(["info"]) == 0
        assert f"built by {build['compiler']} -O3" in capsys.readouterr().out
    monkeypatch.setattr(fastgru._library, "load_error", "the library is missing")
    assert _machine.build() is None


def test_info_tells_why_and_what_to_do_without_the_extension(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastgru._library, "load_error", "the library is missing; build it")
    fastgru.backends.registry.forget()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "not available: the library is missing; build it" in text
    assert "runs on: reference" in text
    monkeypatch.undo()
    fastgru.backends.registry.forget()


def test_info_says_what_the_cuda_part_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "+cu" not in fastgru.__version__:
        assert _machine.cuda_part() is None
        assert main(["info"]) == 0
        assert "not in this installation" in capsys.readouterr().out
    monkeypatch.setattr(torch.ops.fastgru, "cuda_versions", lambda: (13000, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    assert "built with CUDA 13.0; no driver here" in capsys.readouterr().out

    def architecture(index: int) -> int:
        if index:
            raise RuntimeError("no code of this build runs on CUDA device 1\nmore")
        return 90

    monkeypatch.setattr(torch.ops.fastgru, "cuda_versions", lambda: (12060, 13010))
    monkeypatch.setattr(torch.ops.fastgru, "cuda_code_architecture", architecture)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _machine.cuda_part() == {
        "built_with": "12.6",
        "driver": "13.1",
        "devices": ["sm_90", "no code of this build runs on CUDA device 1"],
    }


@pytest.mark.usefixtures("torch_alone")
def test_info_needs_torch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "Backends, best first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "says"), [("FASTGRU_BACKEND", "known backends: auto, cpu"), ("FASTGRU_CPU_ISA", "usable here")]
)
@pytest.mark.parametrize("name", ["info", "verify"])
def test_bad_environment_is_one_clear_error(tmp_path: Path, name: str, variable: str, says: str) -> None:
    if variable == "FASTGRU_CPU_ISA" and not _machine.usable_isas():
        pytest.skip("no compiled kernels")
    done = command(name, cwd=tmp_path, **{variable: "nonsense"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"fastgru {name}: {variable}: ")
    assert "'nonsense'" in done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_runs_outside_the_source_tree_and_into_a_closed_pipe(tmp_path: Path) -> None:
    assert json.loads(command("info", "--json", cwd=tmp_path).stdout)["command"] == "info"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fastgru", "info"], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(write)
    assert done.stderr == ""


# --- verify


@pytest.mark.usefixtures("one_problem")
def test_verify_covers_every_backend_isa_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    before = _machine.current_isa()
    assert main(["verify"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "PASS" in line]
    engines = {*(f"cpu {isa} " for isa in _machine.usable_isas()), "reference "}
    assert len(rows) >= 2 * len(engines) * len(_common.DTYPES)
    for engine in engines:
        for dtype in _common.DTYPES:
            for family in ("gru", "attention"):
                assert any(family in row and engine in row and f" {dtype} " in row for row in rows)
    assert _machine.current_isa() == before


@pytest.mark.usefixtures("one_problem", "torch_alone")
def test_verify_needs_torch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert "all within the rule" in capsys.readouterr().out


@pytest.mark.usefixtures("one_problem", "wrong_numbers")
def test_verify_fails_on_wrong_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: reference, T2-B2-I3-H5" in text
    assert "grad of hx" in text
    assert "PASS" not in text


def wrong_results(right: Any, **wrong: Any) -> Any:
    return lambda *args, **kwargs: right(*args, **{**kwargs, **wrong})


def wrong_gradient(right: Any) -> Any:
    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The same numbers, and 1.01 times the gradient of query.
        return right(1.01 * query - 0.01 * query.detach(), *args, **kwargs)

    return lambda query, **kwargs: attention(query, **kwargs)


WRONG_KERNELS: dict[str, tuple[Any, str, Any, str]] = {
    "gru": (fastgru.GRU, "forward", lambda right: lambda *args: tuple(1.01 * t for t in right(*args)), "T2-B2"),
    "attention, output": (fastgru, "flash_attention", lambda right: wrong_results(right, softcap=1.0), "B2-H4/2"),
    "attention, a gradient": (fastgru, "flash_attention", wrong_gradient, "B2-H4/2"),
}


@pytest.mark.usefixtures("one_problem")
@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_verify_fails_on_a_wrong_kernel(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, function, wrong, problem = WRONG_KERNELS[name]
    monkeypatch.setattr(owner, function, wrong(getattr(owner, function)))
    assert main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"FAILED: reference, {problem}") for line in lines)
    # The other family is not blamed.
    assert all(problem in line for line in lines if line.startswith("FAILED"))
    assert [line for line in lines if "PASS" in line]


@pytest.mark.usefixtures("one_problem")
def test_verify_says_which_problems_a_backend_has_no_kernel_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(problem: testing.AttentionProblem) -> list[testing.Comparison]:
        raise fastgru.BackendUnavailable("no kernel")

    monkeypatch.setattr(testing, "attention_parity", refuse)
    assert main(["verify"]) == 0
    text = capsys.readouterr().out
    assert "Skipped: attention, reference, float32: 1 of 1 problems: no kernel" in text
    assert not [line for line in text.splitlines() if "attention" in line and "PASS" in line]


@pytest.mark.usefixtures("one_problem")
def test_verify_compares_all_threads_with_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _machine.usable_isas():
        pytest.skip("no compiled kernels")
    before = torch.get_num_threads()
    monkeypatch.setattr(verify, "thread_difference", lambda _, count: testing.Comparison(f"{count}!", 1e-9, 0.0, 0.0))
    with verify.threads(3):
        assert main(["verify"]) == 1
    assert capsys.readouterr().out.count("3!: error 1e-09") == 2 * len(_machine.usable_isas())
    assert torch.get_num_threads() == before


def test_verify_problems_cover_what_they_should() -> None:
    problems = verify.PROBLEMS["gru"]
    for option in ("bidirectional", "packed", "batch_first"):
        assert any(getattr(problem, option) for problem in problems)
    assert any(not problem.bias for problem in problems)
    assert any(problem.H % 16 for problem in problems)
    attention = verify.PROBLEMS["attention"]
    for option in ("causal", "mask", "float_mask", "lowest_mask", "bias", "q_lengths", "k_lengths", "softcap", "alibi"):
        assert any(getattr(problem, option) for problem in attention)
    assert {problem.Hq // problem.Hk for problem in attention} >= {1, 2, 4}
    assert {problem.sdpa for problem in attention} == {False, True}


# --- bench


def test_bench_times_every_combination_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "result.json"
    threads = torch.get_num_threads()
    try:
        arguments = ["--dtype", "float32", "float64", "--bidirectional", "--layers", "2", "--threads", "1"]
        assert main([*SMALL_BENCH, *arguments, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("fwd+bwd") == 4
    record = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "backends", "device", "layers", "bidirectional"} < set(record)
    assert [(r["dtype"], r["H"]) for r in record["results"]] == [
        ("float32", 8), ("float32", 5), ("float64", 8), ("float64", 5),
    ]  # fmt: skip
    for result in record["results"]:
        assert result["broken"] == []
        assert set(result["times"]) == {"forward", "forward + backward"}
        for times in result["times"].values():
            assert times["speedup_q1"] <= times["speedup"] <= times["speedup_q3"]
            assert times["baseline_s"] > 0
        for latency in (
            result["latency_s"][mode][who] for mode in result["times"] for who in ("baseline", "candidate")
        ):
            assert 0 < latency["p50"] <= latency["p90"]


def test_bench_times_attention_against_every_backend_of_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "result.json", tmp_path / "bench.png"
    options = ["--causal", "--training", "--keys", "5", "7", "--json", str(file), "--plot", str(picture)]
    assert main([*SMALL_ATTENTION, *options]) == 0
    text = capsys.readouterr().out
    assert text.count("flash") == text.count("math") == 4 and text.count("fwd+bwd") == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(file.read_text())
    assert record["family"] == "attention" and record["causal"] is True
    assert [[result[name] for name in ("B", "Hq", "Hk", "Lq", "Lk", "D")] for result in record["results"]] == [
        [1, 4, 2, 5, 5, 8],
        [1, 4, 2, 5, 7, 8],
    ]
    for result in record["results"]:
        assert result["broken"] == [] and result["left_out"] == {}
        for mode in ("forward", "forward + backward"):
            times, peers = result["times"][mode], result["peers"][mode]
            assert set(peers) == {"flash", "math"}
            assert times["baseline_s"] == min(peer["baseline_s"] for peer in peers.values())
            assert times == {**peers[times["peer"]], "peer": times["peer"]}
            assert times["speedup_q1"] <= times["speedup"] <= times["speedup_q3"]
            assert set(result["latency_s"][mode]) == {"baseline", "candidate"}
    # Forward alone; compared with what both records hold.
    assert main([*SMALL_ATTENTION, "--causal", "--compare", str(file)]) == 0
    text = capsys.readouterr().out
    assert "Speed-up over torch, beside" in text and "fwd+bwd" not in text
    # Another family, and another setting.
    assert main([*SMALL_BENCH, "--compare", str(file)]) == main([*SMALL_ATTENTION, "--compare", str(file)]) == 0
    assert capsys.readouterr().out.count("nothing to compare") == 2


def test_bench_compares_with_a_record_of_before_there_were_families(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    assert main([*SMALL_BENCH, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    old = {name: value for name, value in record.items() if name != "family"}
    assert len(bench.compare(old, record)) == 4


def test_attention_that_would_take_gigabytes_is_compared_in_part() -> None:
    small = testing.AttentionProblem(B=2, Hq=8, Hk=2, Lq=512, Lk=512)
    assert _bench_attention.checked(small) == small
    for problem in (
        testing.AttentionProblem(B=8, Hq=16, Hk=16, Lq=8192, Lk=8192, causal=True),
        testing.AttentionProblem(B=64, Hq=8, Hk=2, Lq=1, Lk=1 << 20),
        testing.AttentionProblem(B=1, Hq=8, Hk=1, Lq=1, Lk=1 << 24),
    ):
        part = _bench_attention.checked(problem)
        assert part.Hq // part.Hk == problem.Hq // problem.Hk and part.causal == problem.causal
        assert 1 << 20 < part.B * part.Hq * part.Lq * part.Lk <= 1 << 22
    assert "GiB" in (_bench_attention.why_not("math", testing.AttentionProblem(Lq=1 << 16, Lk=1 << 16)) or "")
    assert _bench_attention.why_not("math", small) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--family", "attention", "--hidden", "3"], "--hidden is no option of --family attention"),
        (["--kv-heads", "2"], "--kv-heads is no option of --family gru"),
        (["--family", "attention", "--heads", "4", "--kv-heads", "3"], "--heads 4 is not a multiple of --kv-heads 3"),
    ],
)
def test_bench_refuses_options_that_do_not_go_together(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_bench_says_why_a_backend_does_not_take_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(problem: testing.AttentionProblem) -> list[testing.Comparison]:
        raise fastgru.BackendUnavailable("it has no such kernel")

    monkeypatch.setattr(testing, "attention_parity", refuse)
    assert main(SMALL_ATTENTION) == 2
    assert "fastgru bench: it has no such kernel" in capsys.readouterr().err


@pytest.mark.usefixtures("wrong_numbers")
@pytest.mark.parametrize("small", [SMALL_BENCH, SMALL_ATTENTION], ids=["gru", "attention"])
def test_bench_does_not_time_wrong_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: list[str]
) -> None:
    file = tmp_path / "result.json"
    assert main([*small, "--json", str(file)]) == 1
    assert "not timed" in capsys.readouterr().out
    for result in json.loads(file.read_text())["results"]:
        assert result["times"] == {}
        assert "grad of hx" in result["broken"][0]


# --- what users get wrong


def test_bench_compares_with_an_earlier_record_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, picture = tmp_path / "old.json", tmp_path / "bench.png"
    assert main([*SMALL_BENCH, "--json", str(old), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads(old.read_text())
    first, second = record["results"]
    # As if it had been a thousand times as fast, and a thousand times as slow; whatever this machine does today.
    for result, factor in ((first, 1e3), (second, 1e-3)):
        for times in result["times"].values():
            for name in ("speedup", "speedup_q1", "speedup_q3"):
                times[name] *= factor
    rows = bench.compare(record, json.loads(old.read_text()))
    assert [row[-1] for row in rows] == ["slower", "slower", "faster", "faster"]
    assert bench.compare(record | {"layers": 2}, record) == []
    capsys.readouterr()
    assert main([*SMALL_BENCH, "--compare", str(old)]) == 0
    assert "Speed-up over nn.GRU, beside" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"command": "demo"}'])
def test_bench_refuses_to_compare_with_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    assert main([*SMALL_BENCH, "--compare", str(path)]) != 0
    assert f"--compare {path}" in capsys.readouterr().err


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("name", ["bench", "demo"])
def test_missing_extra_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert "pip install 'fastgru[demo]'" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice"),
        (["bench", "--hidden", "0"], "must be from 1"),
        (["bench", "--hidden", "128,256"], "not a whole number"),
        (["bench", "--hidden"], "expected at least one argument"),
        (["bench", "--dtype", "int8"], "invalid choice"),
        (["bench", "--seconds", "-1"], "must be above 0"),
        (["bench", "--seconds", "nan"], "must be above 0"),
        (["bench", "--device", "tpu"], "not a device"),
        (["bench", "--device", "mps"], "use cpu or cuda"),
        (["bench", "--device", "cuda:99"], "CUDA device"),
        (["demo", "--steps", "-3"], "must be from 1"),
        (["demo", "--hidden", "9999999999999"], "must be from 1"),
        (["demo", "--seed", "-1"], "must be from 0"),
    ],
)
def test_bad_option(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_bench_refuses_an_unwritable_file_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL_BENCH, "--json", str(tmp_path)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_sizes_beyond_the_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(*_: object) -> dict[str, Any]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes.")

    monkeypatch.setattr(bench, "measure", measure)
    assert main(SMALL_BENCH) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupt)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["info", "verify", "bench", "demo"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"python -m fastgru {name}" in capsys.readouterr().out


# --- timing and tables


def test_pair_summary_is_the_median_of_the_ratios() -> None:
    pair = _timing.Pair([2.0, 4.0, 9.0, 8.0, 10.0], [1.0, 1.0, 3.0, 4.0, 2.0])
    summary = pair.summary()
    assert summary == {
        "rounds": 5,
        "baseline_s": 8.0,
        "candidate_s": 2.0,
        "speedup": 3.0,
        "speedup_q1": 2.0,
        "speedup_q3": 4.0,
    }
    assert _timing.Pair([3.0], [2.0]).summary()["speedup_q1"] == 1.5


def test_time_pair_alternates_and_calls_both_equally_often() -> None:
    calls: list[str] = []
    pair = _timing.time_pair(
        lambda: calls.append("a"), lambda: calls.append("b"), device=torch.device("cpu"), seconds=1e-6, min_rounds=4
    )
    assert len(pair.baseline) == len(pair.candidate) == 4
    assert calls.count("a") == calls.count("b")
    blocks = "".join(calls)[4:].replace("aa", "a").replace("bb", "b")
    while "aa" in blocks or "bb" in blocks:
        blocks = blocks.replace("aa", "a").replace("bb", "b")
    # ab, ba, ab, ba: equal neighbours have merged.
    assert blocks in ("ababa", "baba")


def test_percentiles_are_of_the_values_and_not_guessed() -> None:
    thousand = [float(i) for i in range(1001)][::-1]
    assert _timing.percentiles(thousand) == pytest.approx({"p50": 500, "p90": 900, "p99": 990})
    assert set(_timing.percentiles(thousand[:99])) == {"p50", "p90"}
    assert _timing.percentiles([1.0]) == {}


def test_latency_times_single_calls_and_the_gpu_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 7.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("sync"))
    measured = _timing.latency(lambda: log.append("call"), device=torch.device("cuda"), seconds=1e-9)
    assert measured["device"] == pytest.approx(7e-3)
    assert " ".join(log).count("sync event call event sync") == log.count("call") == 20
    log.clear()
    measured = _timing.latency(lambda: log.append("call"), device=torch.device("cpu"), seconds=1e-9)
    assert set(measured) == {"p50", "p90"} and log == ["call"] * 20


def test_json_has_no_nan() -> None:
    assert json.loads(_common.to_json({"a": [float("nan"), 1.0], "b": {"c": float("inf")}})) == {
        "a": ["nan", 1.0],
        "b": {"c": "inf"},
    }


def test_commit_is_that_of_the_source_tree_or_none() -> None:
    commit = _machine.commit()
    assert commit is None or len(commit.removesuffix("+dirty")) == 12
