"""Launches the attention kernels for Hopper (sm_90), which are written in Gluon, through the C++ library.

They were compiled ahead of time, travel in the CUDA wheels as cubins, with a manifest that says how each is launched
(tools/build_cubins.py), and need neither a compiler nor Triton. A problem that has a kernel forward has one backward.

``fastgru/backends/measured_attention.json`` holds where they were measured against the ``triton`` backend: times of
forward and of backward calls by architecture, dtype, D, L and causal or not. Under ``auto`` each of the two runs where
the nearest measurement, no more than a factor of two away in L, has it ahead. Nothing else makes ``auto`` take them.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.backends import measured, registry
from fastgru.backends.gluon import CUBINS, manifest
from fastgru.ops.attention import triton
from fastgru.ops.attention.arguments import Attention, empty_like_layout

#: The measurements that ``auto`` goes by.
TABLE = measured.PATH.with_name("measured_attention.json")

# Queries of one tile forward, numbers of the backward kernel's plan for one of its tiles; and what the tensors of a
# section of heads may take of the L2 cache.
_ROWS = 128
_FIELDS = 16
_SECTION_BYTES = 32 * 2**20

# Kinds of arguments, as csrc/cuda/cubin_launch.h numbers them.
_MAP, _POINTER, _INTEGER, _NUMBER = range(4)

# Why a launch failed; once it has, auto does not try again.
_broken: list[str] = []


def _name(a: Attention, kernel: str = "forward") -> str:
    return f"attention_{kernel}_{str(a.query.dtype).removeprefix('torch.')}_{a.query.shape[3]}"


def why_not(a: Attention) -> str | None:
    """None when there is a kernel for this problem, else the reason."""
    extras = {
        "a bias": a.bias is not None,
        "a mask": a.mask is not None,
        "ALiBi": a.alibi_slopes is not None,
        "dropout": a.dropout_seed is not None,
        "softcap": a.softcap > 0,
        "a window to the left": a.window_left >= 0,
        "a scale that is not within 1e-30 and 1e30": not 1e-30 < a.scale < 1e30,
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
def _measured(architecture: str, dtype: torch.dtype) -> list[list[Any]]:
    table = json.loads(TABLE.read_text())["measured"]
    rows: list[list[Any]] = table.get(architecture, {}).get(str(dtype).removeprefix("torch."), [])
    return rows


def is_faster(a: Attention, backward: bool = False) -> bool:
    """Whether the measurement nearest to a problem, if one is near enough, has the kernel forward, or the one backward,
    ahead of Triton's."""
    architecture = measured.architecture(a.query.device)
    best = (math.log(measured.REACH) + 1e-9, False)
    for columns, length, causal, *times in _measured(architecture, a.query.dtype):
        if (columns, bool(causal)) == (a.query.shape[3], a.window_right == 0) and a.key.shape[2]:
            ours, theirs = (math.inf if time is None else time for time in (times[2:] if backward else times[:2]))
            best = min(best, (abs(math.log(length / a.key.shape[2])), ours < theirs))
    return best[1]


class Pass(NamedTuple):
    """What ``auto`` decides by: a problem, and in which direction it is to run."""

    arguments: Attention
    backward: bool


def wins(device: torch.device, dtype: torch.dtype, problem: Pass | None) -> bool:
    """Whether ``auto`` takes the kernel of one direction for a problem."""
    if problem is None or not problem.arguments.query.is_cuda or why_not(problem.arguments) is not None:
        return False
    return is_faster(*problem)


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


def backward_section_of(a: Attention) -> int:
    """How many key heads are done before the next ones, so that what they and their queries have stays there."""
    rows = 2 * a.key.shape[2] + 4 * a.group * a.query.shape[2]
    bytes_of_one = rows * a.key.shape[3] * a.key.element_size()
    return min(a.key.shape[0] * a.key.shape[1], max(1, _SECTION_BYTES // bytes_of_one))


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


def arguments_of(
    a: Attention, output: Tensor, lse: Tensor, statistics: Tensor
) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """What the forward kernel takes, by the names of its arguments: tensors and numbers."""
    tensors = {
        "q_desc": for_tma(a.query),
        "k_desc": for_tma(a.key),
        "v_desc": for_tma(a.value),
        # A view: what is fresh lies as TMA likes it.
        "o_desc": for_tma(output),
        "lse": lse,
        "statistics": statistics,
        **_lengths(a),
    }
    return tensors, {**_numbers(a, section_of(a)), "scale": a.scale * math.log2(math.e)}


def _lengths(a: Attention) -> dict[str, Tensor | None]:
    both = {"q_lengths": a.q_lengths, "k_lengths": a.k_lengths}
    return {name: None if t is None else t.contiguous() for name, t in both.items()}


def _numbers(a: Attention, section: int) -> dict[str, float]:
    everything = a.query.shape[2] + a.key.shape[2]
    return {
        "flags": (a.q_lengths is not None) + 2 * (a.k_lengths is not None) + 4 * a.bottom_right,
        "right": everything if a.window_right < 0 else min(a.window_right, everything),
        "section": section,
    }


class Backward:
    """What the backward kernels take, by the names of their arguments, and how many programs each has; ``programs`` of
    the main one run at a time, and the order in which gradients are added up depends on their number. ``sizes`` are
    those of the kernel, of a block of queries (BLOCK_M) and of keys (BLOCK_N)."""

    def __init__(
        self, a: Attention, output: Tensor, statistics: Tensor, d_output: Tensor | None, d_lse: Tensor | None,
        sizes: dict[str, Any], processors: int,
    ) -> None:  # fmt: skip
        device = a.query.device
        batch, heads, queries, _ = a.query.shape
        key_heads, keys = a.key.shape[1:3]
        tiles = batch * key_heads * -(-keys // sizes["BLOCK_N"])
        self.programs = min(tiles, processors)
        # Of the plan, with one round more, which ends it.
        slots = self.programs * (-(-tiles // self.programs) + 1)
        padded = -(-queries // 128) * 128
        self.row_programs = max(batch * heads * padded // 64, -(-slots // 128))
        self.gradients = tuple(empty_like_layout(t, t.size(3)) for t in (a.query, a.key, a.value))
        # The one sum that is not made in registers.
        self.d_query = torch.zeros(a.query.shape, dtype=torch.float32, device=device)
        do_desc = for_tma(torch.zeros_like(output) if d_output is None else d_output)
        stats = torch.empty((batch, heads, 4, padded), dtype=torch.float32, device=device)
        plan = torch.empty((slots, _FIELDS), dtype=torch.int32, device=device)
        numbers = _numbers(a, backward_section_of(a))
        scale = a.scale * math.log2(math.e)
        self.rows: tuple[dict[str, Tensor | None], dict[str, float]] = (
            {
                "o_desc": for_tma(output), "do_desc": do_desc, "statistics": statistics.contiguous(),
                "d_lse": None if d_lse is None else d_lse.contiguous(), "stats": stats, "plan": plan, **_lengths(a),
            },
            {
                **numbers, "flags": numbers["flags"] + 8 * (d_lse is not None), "programs": self.programs,
                "heads": key_heads, "keys": keys, "padded": padded,
            },
        )  # fmt: skip
        self.main: tuple[dict[str, Tensor | None], dict[str, float]] = (
            {
                "q_desc": for_tma(a.query), "k_desc": for_tma(a.key), "v_desc": for_tma(a.value), "do_desc": do_desc,
                "stats_desc": stats, "dq_desc": self.d_query, "dk_desc": for_tma(self.gradients[1]),
                "dv_desc": for_tma(self.gradients[2]), "plan": plan,
                "turns": torch.zeros((batch, heads, -(-queries // sizes["BLOCK_M"])), dtype=torch.int32, device=device),
            },
            {"scale": scale},
        )  # fmt: skip

    def finish(self, a: Attention) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, when the kernels have run."""
        d_query, d_key, d_value = self.gradients
        torch.mul(self.d_query, a.scale, out=d_query)
        return d_query, d_key, d_value


def _start(
    name: str, arguments: tuple[dict[str, Tensor | None], dict[str, float]], programs: int, device: torch.device,
    cooperative: bool = False,
) -> None:  # fmt: skip
    entry = (manifest() or {})[name]
    given, plan, floats = plan_of(entry, *arguments)
    with torch.cuda.device(device):
        torch.ops.fastgru.cuda_launch(
            given, str(CUBINS / entry["file"]), entry["symbol"], device.index, programs, cooperative, entry["threads"],
            entry["shared"], plan, floats,
        )  # fmt: skip


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    device = a.query.device
    output = empty_like_layout(a.query, a.value.size(3))
    rows = a.query.shape[:3]
    lse, statistics = (torch.empty(shape, dtype=torch.float32, device=device) for shape in (rows, (2, *rows)))
    tiles = a.query.shape[0] * a.query.shape[1] * -(-a.query.shape[2] // _ROWS)
    _start(_name(a), arguments_of(a, output, lse, statistics), min(tiles, _processors(device)), device)
    return output, lse, statistics


def _launch_backward(
    a: Attention, output: Tensor, statistics: Tensor, d_output: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = a.query.device
    sizes = (manifest() or {})[_name(a, "backward")]["sizes"]
    call = Backward(a, output, statistics, d_output, d_lse, sizes, _processors(device))
    _start(_name(a, "backward_rows"), call.rows, call.row_programs, device)
    # Its programs wait for each other.
    _start(_name(a, "backward"), call.main, call.programs, device, cooperative=True)
    return call.finish(a)


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator; see :mod:`fastgru.ops.attention.schema`.

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
            reason = _failed(error)
    if not auto:
        raise registry.BackendUnavailable(f"backend 'gluon' cannot run this attention: {reason}")
    return triton.attention(*arguments)


def _failed(error: RuntimeError) -> str:
    """Why a launch failed, which ``auto`` says once, and then tries none again."""
    reason = str(error)
    if registry.requested() == registry.AUTO:
        _broken.append(reason)
        warnings.warn(f"fastgru's attention runs on 'triton': {reason}", RuntimeWarning, stacklevel=3)
    return reason


def attention_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward operator; see :mod:`fastgru.ops.attention.schema`. Output and statistics are what ``triton``
    saves, too.

    Raises:
        BackendUnavailable: there is no kernel for this problem, or it does not start, and it was asked for by name.
    """
    *inputs, output, statistics, _ = arguments
    a = Attention(*inputs)
    auto = registry.requested() == registry.AUTO
    reason = _broken[0] if auto and _broken else why_not(a)
    if reason is None:
        try:
            grads = _launch_backward(a, output, statistics, grad_output, grad_lse)
            return *grads, torch.zeros(0, dtype=a.query.dtype, device=a.query.device)
        except RuntimeError as error:
            reason = _failed(error)
    if not auto:
        raise registry.BackendUnavailable(f"backend 'gluon' cannot run this attention's backward pass: {reason}")
    return triton.attention_backward(grad_output, grad_lse, *arguments)
