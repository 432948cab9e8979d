"""Looks up which GRU kernels were measured to be the faster on a GPU, by which ``auto`` chooses.

``measured_gru.json`` holds the measurements; ``fastgru/ops/attention/gluon.py`` reads those of attention, in
``measured_attention.json``.

``measured`` maps an architecture ("sm_90") to a precision ("bfloat16", "float16", "float32", "tf32") to rows with the
columns named in the file: a problem, and the microseconds that a whole call took on each backend, from the one ``auto``
tries first to cuDNN; null where a backend does not take the problem. ``benchmarks/gpu/make_table.py`` writes the file
from the results of ``benchmarks/gpu/bench_gru.py``. What nobody measured goes to cuDNN, as with nn.GRU.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from fastgru.backends.registry import Sizes

PATH = Path(__file__).with_name("measured_gru.json")

#: The backends of the last columns.
BACKENDS = ("cuda", "triton", "cudnn")

#: A measurement speaks for a problem whose H, B and T each differ by no more than this factor.
REACH = 2.0


@functools.cache
def _measured() -> dict[str, dict[str, list[list[Any]]]]:
    table: dict[str, Any] = json.loads(PATH.read_text())
    measured: dict[str, dict[str, list[list[Any]]]] = table["measured"]
    return measured


def architecture(device: torch.device | str) -> str:
    """The name under which the table has a GPU, for example "sm_90"."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision(dtype: torch.dtype) -> str | None:
    """The name under which the table has a dtype; None for float32 of which only one library may use TF32."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    ours = torch.backends.cuda.matmul.fp32_precision == "tf32"
    theirs = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return None if ours != theirs else "tf32" if ours else "float32"


def wins(backend: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None) -> bool:
    """Whether ``backend`` was measured to beat those that come after it in :data:`BACKENDS`, see :func:`ahead`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return ahead(backend, architecture(device), precision(dtype), sizes)


@functools.lru_cache(maxsize=4096)
def ahead(backend: str, architecture: str, precision: str | None, sizes: Sizes | None) -> bool:
    """Whether the measurement nearest to a problem, if one is near enough, has ``backend`` ahead of those after it;
    without sizes, whether most measurements have. Of equally near ones, all must."""
    rows = _measured().get(architecture, {}).get(precision or "", [])
    first = BACKENDS.index(backend) - len(BACKENDS)

    def is_ahead(row: list[Any]) -> bool:
        own, *others = (math.inf if time is None else time for time in row[first:])
        return bool(own < min(others))

    if sizes is None:
        return 2 * sum(map(is_ahead, rows)) > len(rows)
    kind = [sizes.directions, sizes.training, sizes.packed]
    near: dict[float, list[bool]] = {}
    for row in rows:
        if row[3:6] == kind:
            pairs = zip(row[:3], (sizes.hidden, sizes.batch, sizes.steps), strict=True)
            steps = [abs(math.log(a / b)) if a and b else math.inf for a, b in pairs]
            if max(steps) <= math.log(REACH) + 1e-9:
                near.setdefault(sum(steps), []).append(is_ahead(row))
    return bool(near) and all(near[min(near)])
