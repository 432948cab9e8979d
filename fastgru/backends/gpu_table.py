"""Where the Triton kernels were measured to beat nn.GRU's own: ``gpu_table.json``, which ``auto`` goes by.

``measured`` maps an architecture ("sm_90") to a precision ("bfloat16", "float16", "float32", "tf32") to rows with the
columns named in the file; times are microseconds of a whole call. ``benchmarks/gpu/make_table.py`` writes the file from
the results of ``benchmarks/gpu/bench_gru.py``. What nobody measured goes to cuDNN, as with nn.GRU.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from fastgru.backends.registry import Sizes

PATH = Path(__file__).with_suffix(".json")

#: A measurement speaks for a problem whose H, B and T each differ by no more than this factor.
REACH = 2.0


@functools.cache
def _measured() -> dict[str, dict[str, list[list[float]]]]:
    table: dict[str, Any] = json.loads(PATH.read_text())
    measured: dict[str, dict[str, list[list[float]]]] = table["measured"]
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


@functools.lru_cache(maxsize=4096)
def triton_wins(architecture: str, precision: str | None, sizes: Sizes | None) -> bool:
    """Whether the measurement nearest to a problem, if one is near enough, has the Triton kernels ahead; without sizes,
    whether most measurements do."""
    rows = _measured().get(architecture, {}).get(precision or "", [])
    if sizes is None:
        return 2 * sum(ours < theirs for *_, ours, theirs in rows) > len(rows)
    kind = (sizes.directions, sizes.training, sizes.packed)
    best = (math.inf, False)
    for H, B, T, directions, training, packed, ours, theirs in rows:
        if (directions, training, packed) == kind:
            steps = [
                abs(math.log(a / b)) if a and b else math.inf
                for a, b in ((H, sizes.hidden), (B, sizes.batch), (T, sizes.steps))
            ]
            if max(steps) <= math.log(REACH) + 1e-9:
                best = min(best, (sum(steps), ours < theirs))
    return best[1]
