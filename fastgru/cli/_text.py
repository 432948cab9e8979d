"""Reads and checks the demo's text, and encodes it as characters."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgru.cli._common import CommandError

MAX_CHARACTERS = 20_000_000
MAX_VOCABULARY = 256
UNKNOWN = "\ufffd"


@dataclass(frozen=True)
class Corpus:
    """A text as character numbers: ``train`` and ``test`` are int64 [N]; character ``i`` is ``vocabulary[i]``."""

    source: str
    vocabulary: str
    train: Tensor
    test: Tensor

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)


def load(file: Path | None, window: int) -> Corpus:
    """``file``, or Python's own documentation, split 95 : 5 into training and test text.

    Raises CommandError unless both parts hold at least one window and there is something to predict.
    """
    text, source = (read(file), str(file)) if file else (python_documentation(), "Python's documentation (pydoc_data)")
    needed = 20 * (window + 1)
    if len(text) < needed:
        raise CommandError(
            f"{source} has {len(text):,} characters; windows of {window} characters (--seq) need at least {needed:,}"
        )
    counts = Counter(text)
    if len(counts) < 2:
        raise CommandError(f"{source} repeats a single character: there is nothing to learn")
    kept = [character for character, _ in counts.most_common(MAX_VOCABULARY - 1)]
    if len(kept) < len(counts):
        kept = [*(c for c in kept if c != UNKNOWN), UNKNOWN]
    vocabulary = "".join(sorted(kept))
    index = {character: i for i, character in enumerate(vocabulary)}
    unknown = index.get(UNKNOWN, 0)
    ids = torch.tensor([index.get(character, unknown) for character in text])
    split = len(text) - len(text) // 20
    return Corpus(source, vocabulary, ids[:split], ids[split:])


def read(file: Path) -> str:
    """The first 20 million characters of a UTF-8 text file."""
    if not file.exists():
        raise CommandError(f"--text {file}: no such file")
    if file.is_dir():
        raise CommandError(f"--text {file}: is a directory, not a text file")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text = stream.read(MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise CommandError(
            f"--text {file}: not UTF-8 text (byte {error.object[error.start]:#04x} cannot be decoded); "
            "a binary file, or text in another encoding?"
        ) from None
    except OSError as error:
        raise CommandError(f"--text {file}: {error.strerror}") from None
    if "\0" in text:
        raise CommandError(f"--text {file}: a binary file (it has NUL bytes), not text")
    if not text.strip():
        raise CommandError(f"--text {file}: the file is empty")
    return text


def python_documentation() -> str:
    """The language reference that every CPython carries, about 465,000 characters."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CommandError("this Python has no pydoc_data.topics; name a text with --text FILE") from None
    names = sorted(topics)
    # Mixed, or the end of the alphabet (the tables of the built-in types) would be the unseen text.
    random.Random(0).shuffle(names)
    return "\n".join(topics[name] for name in names)
