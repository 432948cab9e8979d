"""``python -m fastgru demo``: train nn.GRU and fastgru side by side on real text, and show what differs: the time."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgru.cli import _machine, _text
from fastgru.cli._common import (
    CommandError,
    backend_name,
    check_writable,
    device,
    positive,
    require,
    seed,
    show_table,
    write_json,
)
from fastgru.cli._timing import Pair, stopwatch
from fastgru.nn.seq2seq import Decoder, Encoder, ReferenceDecoder, ReferenceEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

LEARNING_RATE = 4e-3
TEMPERATURE = 0.7
GENERATION_CHUNKS, GENERATION_CHUNK = 12, 60

# Both trainings compute the same function and round differently. AdamW divides each gradient by its own size, so a
# difference in the last bit of a tiny gradient becomes a difference in the weights, and training amplifies it: the
# first steps agree to rounding, after that only the level of the curve can be compared.
EARLY_STEPS = 20
EARLY_TOLERANCE = 2e-6
FINAL_TOLERANCE = 0.01
LOGITS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run, all of it."""

    steps: int
    hidden: int
    embedding: int
    batch: int
    seq: int
    device: str
    seed: int

    @property
    def context(self) -> int:
        """Characters at the head of each window that the encoder reads; the decoder predicts the rest."""
        return max(1, self.seq // 4)


class LanguageModel(nn.Module):
    """A character-level language model: the encoder reads a context, its final state starts the decoder.

    Args:
        encoder, decoder: a pair with ``batch_first=True``, fastgru's or the nn.GRU reference.
    """

    def __init__(self, encoder: Encoder | ReferenceEncoder, decoder: Decoder | ReferenceDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, window: Tensor, context: int) -> Tensor:
        """Logits [B, S - context, V] for the characters after the first ``context`` of ``window`` [B, S].

        ``Decoder.forward`` gives the logits of the last step only; training needs those of every step, so the
        decoder's parts are called in turn, with the true characters as input.
        """
        _, hidden = self.encoder(window[:, :context], None)
        output, _ = self.decoder.rnn(self.decoder.embedding(window[:, context - 1 : -1]), hidden)
        logits: Tensor = self.decoder.out(output)
        return logits

    def loss(self, window: Tensor, context: int) -> Tensor:
        """Mean cross-entropy in nats per character."""
        return F.cross_entropy(self(window, context).flatten(0, 1), window[:, context:].flatten())


def make_model(vocabulary: int, settings: Settings, *, reference: bool) -> LanguageModel:
    sizes = (vocabulary, settings.embedding, settings.hidden)
    if reference:
        model = LanguageModel(ReferenceEncoder(*sizes, batch_first=True), ReferenceDecoder(*sizes, batch_first=True))
    else:
        model = LanguageModel(Encoder(*sizes, batch_first=True), Decoder(*sizes, batch_first=True))
    return model.to(settings.device)


class Trainer:
    """One model with its optimizer."""

    def __init__(self, model: LanguageModel, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, index: int, window: Tensor) -> Tensor:
        """One training step on ``window`` [B, S]; returns the loss."""
        warm_up = max(1, self.settings.steps // 20)
        rate = min((index + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * index / self.settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        self.optimizer.zero_grad()
        loss = self.model.loss(window, self.settings.context)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def train(
    reference: LanguageModel, candidate: LanguageModel, corpus: _text.Corpus, settings: Settings, *, quiet: bool
) -> tuple[list[float], list[float], Pair]:
    """Train both on the same batches, step by step in turn; returns both loss curves and the step times."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    clock = stopwatch(torch.device(settings.device))
    trainers = [Trainer(reference, settings), Trainer(candidate, settings)]
    losses: tuple[list[float], list[float]] = ([], [])
    pair = Pair()
    random = torch.Generator().manual_seed(settings.seed)
    within = torch.arange(settings.seq)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    # Drawn between the steps: a thread that draws would take its time from one of them.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, disable=quiet) as progress:
        task = progress.add_task("Training", total=settings.steps, state="")
        for index in range(settings.steps):
            start = torch.randint(len(corpus.train) - settings.seq, (settings.batch, 1), generator=random)
            window = corpus.train[start + within].to(settings.device)
            times = [0.0, 0.0]
            # Who goes first alternates: the second finds the batch in cache and the first does not.
            for which in (0, 1) if index % 2 == 0 else (1, 0):
                begin = clock()
                loss = trainers[which].step(index, window)
                times[which] = clock() - begin
                losses[which].append(loss.item())
            pair.add(*times)
            recent = slice(-20, None)
            faster = statistics.median(pair.baseline[recent]) / statistics.median(pair.candidate[recent])
            state = f"nn.GRU {losses[0][-1]:.3f}, fastgru {losses[1][-1]:.3f}, {faster:.1f}x"
            progress.update(task, advance=1, state=state, refresh=True)
    return *losses, pair


class Writer:
    """Writes text one character at a time with ``Decoder.forward``, starting after ``prompt`` [1, P]."""

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, prompt: Tensor) -> None:
        self.decoder = model.decoder
        _, self.hidden = model.encoder(prompt, None)
        self.last = prompt[:, -1:]

    @torch.inference_mode()
    def write(self, noise: Tensor) -> list[int]:
        """Sample ``len(noise)`` characters; ``noise`` [N, V] is Gumbel noise times the temperature.

        The largest of ``logits + noise`` is a sample from softmax(logits / temperature). With the noise drawn
        beforehand two models that compute the same function write the same text.
        """
        written = []
        for row in noise:
            logits, self.hidden = self.decoder(self.last, self.hidden)
            self.last = (logits + row).argmax(-1, keepdim=True)
            written.append(self.last)
        return torch.cat(written, 1)[0].tolist()


def generate(
    reference: LanguageModel, candidate: LanguageModel, corpus: _text.Corpus, settings: Settings
) -> tuple[str, list[int], list[int], Pair]:
    """Let both write in turn, a chunk at a time; returns the prompt, both texts as numbers, and the chunk times."""
    place = torch.device(settings.device)
    clock = stopwatch(place)
    prompt = corpus.test[None, : settings.context].to(place)
    random = torch.Generator().manual_seed(settings.seed)
    uniform = torch.rand((GENERATION_CHUNKS, GENERATION_CHUNK, len(corpus.vocabulary)), generator=random)
    noise = (-torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7))) * TEMPERATURE).to(place)
    models = (reference, candidate)
    for model in models:
        Writer(model, prompt).write(noise[0])
    writers = [Writer(model, prompt) for model in models]
    written: tuple[list[int], list[int]] = ([], [])
    pair = Pair()
    for index, chunk in enumerate(noise):
        times = [0.0, 0.0]
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            begin = clock()
            written[which].extend(writers[which].write(chunk))
            times[which] = clock() - begin
        pair.add(*times)
    return corpus.decode(prompt[0].tolist()), *written, pair


@torch.inference_mode()
def evaluate(model: LanguageModel, corpus: _text.Corpus, settings: Settings) -> tuple[Tensor, float]:
    """Logits and loss on (at most 64 windows of) the text that training has not seen."""
    count = min(64, len(corpus.test) // settings.seq)
    windows = corpus.test[: count * settings.seq].view(count, settings.seq).to(settings.device)
    logits = model(windows, settings.context)
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, settings.context :].flatten())
    return logits, loss.item()


def check(name: str, measured: float, allowed: float) -> dict[str, Any]:
    # Written this way round so that NaN fails.
    return {"name": name, "measured": measured, "allowed": allowed, "passed": measured <= allowed}


def compare_losses(reference: list[float], candidate: list[float]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How closely two loss curves agree, and whether that is as close as it has to be."""
    absolute = [abs(a - b) for a, b in zip(reference, candidate, strict=True)]
    relative = [difference / abs(a) for difference, a in zip(absolute, reference, strict=True)]
    early = min(EARLY_STEPS, len(reference))
    tail = max(1, len(reference) // 10)
    final = [statistics.fmean(curve[-tail:]) for curve in (reference, candidate)]
    worst = max(range(len(absolute)), key=absolute.__getitem__)
    agreement = {
        "max_absolute_difference": absolute[worst],
        "max_absolute_difference_at_step": worst + 1,
        "max_relative_difference": max(relative),
        "early_steps": early,
        "early_max_relative_difference": max(relative[:early]),
        "final_mean_reference": final[0],
        "final_mean_fastgru": final[1],
    }
    checks = [
        check(f"training loss, first {early} steps", max(relative[:early]), EARLY_TOLERANCE),
        check(
            f"training loss, mean of the last {tail} steps",
            abs(final[0] - final[1]) / final[0],
            FINAL_TOLERANCE,
        ),
    ]
    return agreement, checks


def speed_record(pair: Pair, characters: int) -> dict[str, Any]:
    summary = pair.summary()
    return {
        **summary,
        "baseline_characters_per_s": characters / summary["baseline_s"],
        "candidate_characters_per_s": characters / summary["candidate_s"],
    }


def run(args: argparse.Namespace) -> int:
    require("demo", "rich", "matplotlib")
    from fastgru.cli import _report

    settings = Settings(args.steps, args.hidden, args.embedding, args.batch, args.seq, str(args.device), args.seed)
    if settings.seq < 4:
        raise CommandError(f"--seq {settings.seq}: a window needs at least 4 characters")
    corpus = _text.load(args.text, settings.seq)
    backend = backend_name(args.device, torch.float32)
    out: Path = args.out
    check_writable(out / "demo.json")
    say: Callable[[str], None] = (lambda _: None) if args.quiet else print

    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    vocabulary = len(corpus.vocabulary)
    reference = make_model(vocabulary, settings, reference=True)
    candidate = make_model(vocabulary, settings, reference=False)
    candidate.load_state_dict(reference.state_dict())
    parameters = sum(parameter.numel() for parameter in candidate.parameters())
    say(
        f"Text: {corpus.source}, {len(corpus.train) + len(corpus.test):,} characters, {vocabulary} different\n"
        f"Model: Encoder and Decoder, embedding {settings.embedding}, hidden {settings.hidden}, "
        f"{parameters:,} parameters; nn.GRU against fastgru (backend {backend}), "
        f"same initial weights, same batches, {torch.get_num_threads()} thread(s)"
    )
    reference_loss, candidate_loss, training = train(reference, candidate, corpus, settings, quiet=args.quiet)
    agreement, checks = compare_losses(reference_loss, candidate_loss)

    checkpoint = out / "checkpoint.pt"
    torch.save(candidate.state_dict(), checkpoint)
    loaded = make_model(vocabulary, settings, reference=True)
    loaded.load_state_dict(torch.load(checkpoint, map_location=settings.device, weights_only=True))
    (logits, test_loss), (loaded_logits, loaded_loss) = (
        evaluate(model, corpus, settings) for model in (candidate, loaded)
    )
    difference = (logits - loaded_logits).abs().max().item() / loaded_logits.abs().max().item()
    checks.append(check("checkpoint in nn.GRU, logits on unseen text", difference, LOGITS_TOLERANCE))

    prompt, loaded_text, text, generation = generate(loaded, candidate, corpus, settings)
    same = next((i for i, (a, b) in enumerate(zip(loaded_text, text, strict=True)) if a != b), len(text))
    # The first steps allocate, pack and warm the caches.
    warm = min(5, settings.steps // 2)
    steady = Pair(training.baseline[warm:], training.candidate[warm:])
    record: dict[str, Any] = {
        "schema": 1,
        "command": "demo",
        "passed": all(item["passed"] for item in checks),
        "settings": asdict(settings),
        "machine": _machine.machine(),
        "versions": _machine.versions(),
        "commit": _machine.commit(),
        "backend": backend,
        "text": {
            "source": corpus.source,
            "train_characters": len(corpus.train),
            "test_characters": len(corpus.test),
            "vocabulary": vocabulary,
        },
        "parameters": parameters,
        "training": speed_record(steady, settings.batch * (settings.seq - settings.context)),
        "generation": {
            **speed_record(generation, GENERATION_CHUNK),
            "characters_per_round": GENERATION_CHUNK,
            "characters": len(text),
            "identical_characters": same,
        },
        "loss": {
            "reference": reference_loss,
            "fastgru": candidate_loss,
            "agreement": agreement,
            "test_fastgru": test_loss,
            "test_checkpoint_in_reference": loaded_loss,
        },
        "checks": checks,
        "sample": {"prompt": prompt, "text": corpus.decode(text), "temperature": TEMPERATURE},
        "seconds": time.perf_counter() - began,
    }
    _report.write(out, record)
    write_json(out / "demo.json", record)
    show(record, out, quiet=args.quiet)
    return 0 if record["passed"] else 1


def show(record: dict[str, Any], out: Path, *, quiet: bool) -> None:
    """Tables, sample and the places of the files; when quiet only the checks that failed."""
    from fastgru.cli import _report

    if not quiet:
        show_table("Speed", *_report.speed_table(record), right=(1, 2, 3, 4))
    if not quiet or not record["passed"]:
        show_table("Same numbers? Relative differences", *_report.check_table(record), right=(1, 2))
    if quiet:
        return
    for line in _report.remarks(record):
        print(line)
    sample = record["sample"]
    print(f"\nWritten by the trained model after {sample['prompt']!r}:\n")
    print("\n".join(f"    {line}" for line in (sample["prompt"] + sample["text"]).splitlines()))
    print(f"\n{record['seconds']:.0f} s. Report: {out / 'report.html'}  Picture: {out / 'demo.png'}")
    print(f"Numbers: {out / 'demo.json'}  Checkpoint: {out / 'checkpoint.pt'}")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train nn.GRU and fastgru side by side on real text",
        description="Train the Encoder/Decoder pair as a character-level language model on real English text, once "
        "with torch.nn.GRU and once with fastgru, from the same weights on the same batches, in turn. Compares loss "
        "curves, speed of training and of generation, and checks that the checkpoint gives the same numbers in "
        "nn.GRU. Writes report.html, demo.png, demo.json and checkpoint.pt.",
        epilog="Needs the 'demo' extra: pip install 'fastgru[demo]'. Exit code 1 if the two disagree.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=1000, help="training steps of each model")
    parser.add_argument("--hidden", type=positive, default=256, help="hidden units of each GRU")
    parser.add_argument("--embedding", type=positive, default=64, help="size of a character's embedding")
    parser.add_argument("--batch", type=positive, default=32, help="windows per step")
    parser.add_argument("--seq", type=positive, default=128, help="characters per window, a quarter of them context")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights, batches and sampling")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to learn instead of Python's own docs")
    parser.add_argument("--out", type=Path, metavar="DIR", default="runs/demo", help="where the results go")
    parser.add_argument("--quiet", action="store_true", help="print nothing but failed checks")
    parser.set_defaults(run=run)
