"""Attention for Hopper (sm_90): the kernels of kernels/attn_sm90_*.py, which the C++ library launches.

They were compiled ahead of time, travel in the CUDA wheels as cubins, with a manifest that says how each is launched
(tools/build_cubins.py), and need neither a compiler nor Triton. The backward pass is the ``triton`` backend's.

``attention_table.json`` holds where they were measured against the ``triton`` backend: times of forward calls by
architecture, dtype, D, L and causal or not. Under ``auto`` they run where the nearest measurement, no more than a
factor of two away in L, has them ahead. Nothing else makes ``auto`` take them.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgru import _lib
from fastgru.backends import gpu_table, registry, triton, triton_attention
from fastgru.backends.reference_attention import Attention, empty_like_layout

CUBINS = Path(_lib.__file__).parent / "cubins"
TABLE = Path(__file__).with_name("attention_table.json")

# Queries of one tile, and what the keys and values of a section of heads may take of the L2 cache.
_ROWS = 128
_SECTION_BYTES = 32 * 2**20

# Kinds of arguments, as csrc/cuda/launch.h numbers them.
_MAP, _POINTER, _INTEGER, _NUMBER = range(4)

# Why a launch failed; once it has, auto does not try again.
_broken: list[str] = []


@functools.cache
def manifest() -> dict[str, Any] | None:
    """How the kernels of this installation are launched, by name; None where there are none."""
    path = CUBINS / "manifest.json"
    return dict(json.loads(path.read_text())["kernels"]) if path.exists() else None


def _available() -> str | None:
    if (reason := triton._available()) is not None:
        return f"its backward pass is that of the backend 'triton', of which: {reason}"
    if _lib.load_error is not None:
        return _lib.load_error
    if manifest() is None:
        return "this installation holds no kernels compiled for it; install a wheel for CUDA (+cu...)"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability != (9, 0) or torch.version.hip is not None:
        return f"it is for GPUs of compute capability 9.0 (Hopper), and this one has {capability[0]}.{capability[1]}"
    return None


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"it has no kernels for {dtype}"


def _name(a: Attention) -> str:
    return f"forward_{str(a.query.dtype).removeprefix('torch.')}_{a.query.shape[3]}"


def why_not(a: Attention) -> str | None:
    """None when there is a kernel for this problem, else the reason."""
    extras = {
        "a bias": a.bias is not None,
        "a mask": a.mask is not None,
        "ALiBi": a.alibi_slopes is not None,
        "dropout": a.dropout_seed is not None,
        "softcap": a.softcap > 0,
        "a window to the left": a.window_left >= 0,
        "a scale that is not positive": not 0 < a.scale < math.inf,
    }
    named = [name for name, given in extras.items() if given]
    if named:
        return f"it has no kernel with {', '.join(named)}"
    columns, value_columns = a.query.shape[3], a.value.shape[3]
    if columns != value_columns or _name(a) not in (manifest() or {}):
        return f"it has no kernel for {a.query.dtype} with head dimensions of {columns} and {value_columns}"
    if 0 in (*a.query.shape, *a.value.shape):
        return "it has no kernel for an empty tensor"
    if a.query.shape[2] + a.key.shape[2] >= 2**30:
        return "its kernels count positions in 32 bits"
    return None


@functools.cache
def _measured(architecture: str, dtype: torch.dtype) -> list[list[float]]:
    measured = json.loads(TABLE.read_text())["measured"]
    rows: list[list[float]] = measured.get(architecture, {}).get(str(dtype).removeprefix("torch."), [])
    return rows


def wins(a: Attention) -> bool:
    """Whether the measurement nearest to a problem, if one is near enough, has these kernels ahead of Triton's."""
    architecture = gpu_table.architecture(a.query.device)
    best = (math.log(gpu_table.REACH) + 1e-9, False)
    for columns, length, causal, ours, theirs in _measured(architecture, a.query.dtype):
        if (columns, bool(causal)) == (a.query.shape[3], a.window_right == 0) and a.key.shape[2]:
            best = min(best, (abs(math.log(length / a.key.shape[2])), ours < theirs))
    return best[1]


def faster(a: Attention) -> bool:
    """Whether ``auto`` takes these kernels for a problem on the ``triton`` backend's devices."""
    return a.query.is_cuda and wins(a) and _available() is None and why_not(a) is None


def for_tma(t: Tensor) -> Tensor:
    """With strides and a place that TMA takes: multiples of 16 bytes, the columns of a row next to each other. A tensor
    that has others, or repeats itself, is copied."""
    unit = 16 // t.element_size()
    # Where there is one of something, its stride means nothing; TMA looks at it all the same.
    strides = [unit if size == 1 else stride for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True)]
    if t.stride(3) != 1 or t.data_ptr() % 16 or any(stride <= 0 or stride % unit for stride in strides):
        return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided(t.shape, (*strides, 1))


def section_of(a: Attention) -> int:
    """How many query heads are done before the next ones, so that their keys and values stay in the L2 cache."""
    bytes_of_one = 2 * a.key.shape[2] * a.key.shape[3] * a.key.element_size()
    return min(a.query.shape[0] * a.query.shape[1], a.group * max(1, _SECTION_BYTES // bytes_of_one))


def plan_of(entry: dict[str, Any], tensors: dict[str, Tensor | None], numbers: dict[str, float]) -> tuple[Any, ...]:
    """The arguments of one launch for ``fastgru::cuda_launch``, in the kernel's order: tensors, plan, numbers."""
    given: list[Tensor] = []
    plan: list[int] = []
    floats: list[float] = []
    for name, kind in entry["arguments"]:
        if kind in ("map", "pointer"):
            t = tensors[name]
            index = -1 if t is None else len(given)
            given += [] if t is None else [t]
            plan += [_POINTER, index]
            if kind == "map":
                described = entry["maps"][name]
                plan[-2] = _MAP
                plan += [described["element"], described["swizzle"], *described["box"]]
        elif kind == "fp32":
            plan += [_NUMBER, len(floats)]
            floats.append(float(numbers[name]))
        else:
            plan += [_INTEGER, int(numbers[name])]
    return given, plan, floats


def arguments_of(a: Attention, output: Tensor, lse: Tensor) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """What the forward kernel takes, by the names of its arguments: tensors and numbers."""
    queries, keys = a.query.shape[2], a.key.shape[2]
    tensors = {
        "q_desc": for_tma(a.query),
        "k_desc": for_tma(a.key),
        "v_desc": for_tma(a.value),
        # A view: what is fresh lies as TMA likes it.
        "o_desc": for_tma(output),
        "lse": lse,
        "q_lengths": None if a.q_lengths is None else a.q_lengths.contiguous(),
        "k_lengths": None if a.k_lengths is None else a.k_lengths.contiguous(),
    }
    everything = queries + keys
    numbers = {
        "flags": (a.q_lengths is not None) + 2 * (a.k_lengths is not None) + 4 * a.bottom_right,
        "right": everything if a.window_right < 0 else min(a.window_right, everything),
        "section": section_of(a),
        "scale": a.scale * math.log2(math.e),
    }
    return tensors, numbers


def _launch(a: Attention) -> tuple[Tensor, Tensor]:
    device = a.query.device
    output = empty_like_layout(a.query, a.value.size(3))
    lse = torch.empty(a.query.shape[:3], dtype=torch.float32, device=device)
    entry = (manifest() or {})[_name(a)]
    given, plan, floats = plan_of(entry, *arguments_of(a, output, lse))
    tiles = a.query.shape[0] * a.query.shape[1] * -(-a.query.shape[2] // _ROWS)
    programs = min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    with torch.cuda.device(device):
        torch.ops.fastgru.cuda_launch(
            given, str(CUBINS / entry["file"]), entry["symbol"], device.index, programs, entry["threads"],
            entry["shared"], plan, floats,
        )  # fmt: skip
    return output, lse


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The forward operator; see :mod:`fastgru.ops.attention_schema`.

    Raises:
        BackendUnavailable: there is no kernel for this problem, or it does not start, and it was asked for by name.
    """
    a = Attention(*arguments)
    auto = registry.requested() == registry.AUTO
    reason = _broken[0] if auto and _broken else why_not(a)
    if reason is None:
        try:
            return _launch(a)
        except RuntimeError as error:
            reason = str(error)
            if auto:
                _broken.append(reason)
                warnings.warn(f"fastgru's attention runs on 'triton': {reason}", RuntimeWarning, stacklevel=2)
    if not auto:
        raise registry.BackendUnavailable(f"backend 'gluon' cannot run this attention: {reason}")
    return triton_attention.attention(*arguments)


# Nothing here to be differentiated by itself: the saved output and lse are what the other kernels save, too.
attention_backward = triton_attention.attention_backward

registry.register(
    registry.Backend(
        name="gluon",
        devices=("cuda",),
        priority=55,
        available=_available,
        supports=_supports,
        attention_only=True,
    )
)
