"""What the stages on a GPU share: their arguments, the check that there is a GPU, and the record they leave."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastgru.backends import registry
from fastgru.cli import _machine

ROOT = Path(__file__).parents[2]
# Where what the stages share with the other benchmarks is.
sys.path.append(str(ROOT / "benchmarks"))
RESULTS = ROOT / "benchmarks" / "results"
PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON record (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this (default: %(default)s)")
    return made


def require_gpu() -> None:
    """Ends the program, with the reason, where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"this stage needs a GPU, and torch {torch.__version__} finds none; check the driver, "
            "CUDA_VISIBLE_DEVICES, and that torch is built for the GPU"
        )


def why_not(backend: str, dtype: torch.dtype, hidden: int, batch: int, directions: int = 1) -> str | None:
    """None when a backend takes a problem, else the reason."""
    found = next(b for b in registry.backends("gru") if b.name == backend)
    sizes = registry.Sizes(hidden, batch, 1, directions, True, False)
    reason = found.why_not("cuda", dtype)
    place = torch.device("cuda", torch.cuda.current_device())
    return reason or registry.refusal("gru", backend, place, dtype, sizes)


def set_precision(name: str) -> torch.dtype:
    """The dtype of a precision, with TF32 on or off in every library."""
    mode = "tf32" if name == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.rnn.fp32_precision = mode
    return PRECISIONS[name]


class Record:
    """A JSON file that is written after every entry, so that a stage cut short leaves what it has measured."""

    def __init__(self, stage: str, out: Path, minutes: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"gpu_{stage}.json"
        self.end = time.monotonic() + 60 * minutes
        properties = torch.cuda.get_device_properties(0)
        self.content: dict[str, Any] = {
            "schema": 1,
            "stage": stage,
            **_machine.origin(),
            "gpu": {
                "name": properties.name,
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            },
            "left_out": [],
            "entries": [],
        }
        self.content["versions"]["cudnn"] = torch.backends.cudnn.version()

    def set(self, **values: Any) -> None:
        self.content.update(values)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def add(self, **entry: Any) -> None:
        self.content["entries"].append(entry)
        self.set()
        print(json.dumps(entry), flush=True)

    def late(self, what: str) -> bool:
        """Whether the time is up; then ``what`` is listed as not measured."""
        if time.monotonic() < self.end:
            return False
        self.content["left_out"].append(what)
        self.set()
        return True
