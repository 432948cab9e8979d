"""The demo: its record, its files, its checks, and the texts people may feed it."""

from __future__ import annotations

import base64
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastgru
from fastgru.cli import _report, _text, demo, main
from fastgru.cli._common import CommandError

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

TINY = ["--steps", "3", "--hidden", "16", "--embedding", "8", "--batch", "2", "--seq", "16"]
FILES = {"checkpoint.pt", "demo.json", "demo.png", "report.html"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert main(["demo", *TINY, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def record(result: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((result / "demo.json").read_text())
    return loaded


def test_writes_its_files(result: Path) -> None:
    assert {file.name for file in result.iterdir()} == FILES
    assert (result / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_record(record: dict[str, Any]) -> None:
    assert record["passed"]
    assert record["settings"] == {
        "steps": 3, "hidden": 16, "embedding": 8, "batch": 2, "seq": 16, "device": "cpu", "seed": 0,
    }  # fmt: skip
    assert {"machine", "versions", "commit", "backend", "text", "parameters", "checks", "seconds"} <= set(record)
    assert len(record["loss"]["reference"]) == len(record["loss"]["fastgru"]) == 3
    assert len(record["checks"]) == 3
    for kind in ("training", "generation"):
        speed = record[kind]
        assert speed["speedup_q1"] <= speed["speedup"] <= speed["speedup_q3"]
        assert speed["candidate_characters_per_s"] > 0
    assert len(record["sample"]["text"]) == record["generation"]["characters"]


def test_both_write_the_same_text(record: dict[str, Any]) -> None:
    assert record["generation"]["identical_characters"] == record["generation"]["characters"]


def test_report_needs_nothing_else(result: Path, record: dict[str, Any]) -> None:
    page = (result / "report.html").read_text()
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (result / "demo.png").read_bytes()
    assert "http" not in page
    assert page.count("PASS</td>") == len(record["checks"])


def test_the_record_can_be_quoted(result: Path, record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    shutil.copy(result / "demo.json", tmp_path / "benchmarks/results")
    (tmp_path / "README.md").write_text("<!-- results:demo.picture --><!-- /results -->\n")
    (tmp_path / "docs/performance.md").write_text("<!-- results:demo.speed --><!-- /results -->\n")
    report = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/report.py"))["Report"]
    report(tmp_path).write(tmp_path / "report.html")
    assert list(report(tmp_path).problems()) == []
    (picture,) = (tmp_path / "docs/images").glob("demo-*.png")
    assert picture.name in (tmp_path / "README.md").read_text()
    assert f"{record['training']['speedup']:.2f}x" in (tmp_path / "docs/performance.md").read_text()


def test_checkpoint_gives_the_same_numbers_in_nn_gru(result: Path, record: dict[str, Any]) -> None:
    state = torch.load(result / "checkpoint.pt", weights_only=True)
    sizes = (record["text"]["vocabulary"], 8, 16)

    def part(name: str, module: nn.Module) -> nn.Module:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        module.load_state_dict(own)
        return module

    ours = (
        part("encoder", fastgru.Encoder(*sizes, batch_first=True)),
        part("decoder", fastgru.Decoder(*sizes, batch_first=True)),
    )
    theirs = (
        part("encoder", fastgru.ReferenceEncoder(*sizes, batch_first=True)),
        part("decoder", fastgru.ReferenceDecoder(*sizes, batch_first=True)),
    )
    context = torch.randint(sizes[0], (3, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for encoder, decoder in (ours, theirs):
        _, hidden = encoder(context, None)
        results.append(decoder(context[:, -1:], hidden))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_same_seed_same_run(tmp_path: Path, record: dict[str, Any]) -> None:
    assert main(["demo", *TINY, "--out", str(tmp_path), "--quiet"]) == 0
    again = json.loads((tmp_path / "demo.json").read_text())
    assert again["loss"] == record["loss"]
    assert again["sample"] == record["sample"]


def test_shows_tables_sample_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *TINY, "--out", str(tmp_path), "--seed", "1"]) == 0
    text = capsys.readouterr().out
    for expected in ("training, ms per step", "generation, characters/s", "PASS", "Written by", *FILES):
        assert expected in text


def test_quiet_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *TINY, "--out", str(tmp_path), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_one_step_is_enough(tmp_path: Path) -> None:
    arguments = ["--steps", "1", "--hidden", "1", "--embedding", "1", "--batch", "1", "--seq", "4"]
    assert main(["demo", *arguments, "--out", str(tmp_path), "--quiet"]) == 0


@pytest.mark.parametrize("name", ["EARLY_TOLERANCE", "FINAL_TOLERANCE", "LOGITS_TOLERANCE"])
def test_disagreement_is_reported_and_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, name, -1.0)
    assert main(["demo", *TINY, "--out", str(tmp_path), "--quiet"]) == 1
    assert capsys.readouterr().out.count("FAIL") == 1
    assert not json.loads((tmp_path / "demo.json").read_text())["passed"]


def test_nan_does_not_agree() -> None:
    _, checks = demo.compare_losses([2.0, float("nan")], [2.0, float("nan")])
    assert not all(check["passed"] for check in checks)


def test_loss_predicts_each_next_character() -> None:
    """The logits at a place may depend on the characters before it and on no other."""
    settings = demo.Settings(steps=1, hidden=8, embedding=4, batch=1, seq=12, device="cpu", seed=0)
    model = demo.make_model(11, settings, reference=False)
    window = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = model(window, settings.context)
    assert logits.shape == (2, 9, 11)
    changed = window.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    # Character 7 is predicted at place 7 - context = 4, and is an input from place 5 on.
    different = (model(changed, settings.context) != logits).any(-1).any(0)
    assert not different[:5].any()
    assert different[5:].all()


def test_writer_continues_what_the_window_says() -> None:
    """Writing with Decoder.forward, a step at a time, follows the logits of the whole sequence."""
    settings = demo.Settings(steps=1, hidden=8, embedding=4, batch=1, seq=12, device="cpu", seed=0)
    model = demo.make_model(11, settings, reference=False)
    prompt = torch.tensor([[3, 1, 4]])
    text = demo.Writer(model, prompt).write(torch.zeros(6, 11))
    whole = torch.cat([prompt, torch.tensor([text])], 1)
    assert model(whole, 3).argmax(-1)[0].tolist() == text


# --- texts


def test_own_text(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\ufeffGrüße, hello world! <b>&amp;</b>\n" * 40, encoding="utf-8")
    assert main(["demo", *TINY, "--text", str(file), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    loaded = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert loaded["text"]["source"] == str(file)
    assert "<b>" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("directory", "is a directory"),
        (b"", "the file is empty"),
        (b" \n\t\n" * 500, "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "not UTF-8 text"),
        (b"some text" + b"\0" * 2000, "NUL bytes"),
        ("café ".encode("latin-1") * 500, "not UTF-8 text"),
        (b"too short to learn from", "need at least 340"),
        (b"a" * 5000, "a single character"),
    ],
)
def test_bad_text_is_one_line(
    content: bytes | str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "book.txt"
    if content == "directory":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    out = tmp_path / "out"
    assert main(["demo", *TINY, "--text", str(file), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert str(file) in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert not out.exists()


def test_unreadable_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "book.txt"
    file.write_text("text")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CommandError, match="Permission denied"):
        _text.read(file)


def test_rare_characters_of_a_large_alphabet_become_one(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    alphabet = "".join(chr(0x4E00 + i) for i in range(600))
    file.write_text(alphabet[:200] * 5 + alphabet, encoding="utf-8")
    corpus = _text.load(file, 16)
    assert len(corpus.vocabulary) == _text.MAX_VOCABULARY
    assert _text.UNKNOWN in corpus.vocabulary
    assert corpus.decode(corpus.train[:200].tolist()) == alphabet[:200]
    assert corpus.decode(corpus.test[-1:].tolist()) == _text.UNKNOWN


@pytest.mark.parametrize("blocked", ["file", "parent"])
def test_unwritable_folder(blocked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    out = file if blocked == "file" else file / "below"
    assert main(["demo", *TINY, "--out", str(out)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_window_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *TINY[:-1], "2", "--out", str(tmp_path)]) == 2
    assert "at least 4 characters" in capsys.readouterr().err


def test_smooth_starts_unbiased_and_follows() -> None:
    assert _report.smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert _report.smooth([4.0, 2.0])[1] == pytest.approx((0.9 * 4 + 2) / 1.9)
