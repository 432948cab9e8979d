"""The GRU in CUDA C++: what ``fastgru.backends.recurrence`` launches, with the kernels of ``csrc/cuda``.

The whole recurrence is one launch that keeps W_hh on chip, spread over a cluster of blocks or over the whole grid; the
compiled library chooses between the two. What neither can run it refuses, with the reason, and so does a launch that
the GPU turns down: asked for by name that raises BackendUnavailable; else the problem goes to the next backend, which
says why once. The saved gates are laid out as Triton's and the reference's, so that either can take over at any point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgru import _lib
from fastgru.backends import gpu_table, recurrence, registry

#: Who takes over what a launch turns down: their gates are laid out alike.
SUCCESSORS = ("triton", "reference")

# What launches have turned down, and why; see _key.
_turned_down: dict[tuple[Any, ...], str] = {}


class _Refused(Exception):  # noqa: N818 (nothing is wrong yet)
    """A launch that did not take place, and why."""


def _aligned(t: Tensor | None) -> Tensor | None:
    """The kernels load 16 bytes at a time, and a view may begin anywhere."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


def _raise_if(refused: str) -> None:
    if refused:
        raise _Refused(refused)


class _Kernels:
    """See :class:`fastgru.backends.recurrence.Kernels`.

    ``loop`` names the recurrence's kernel, "cluster" or "grid"; empty, the library chooses.
    """

    loop = ""

    def upload(self, table: Tensor, device: torch.device) -> Tensor:
        on_device = torch.empty_like(table, device=device)
        # As arguments of launches: no copy waits for the GPU, and a CUDA graph can hold them.
        torch.ops.fastgru.cuda_upload(table, on_device)
        return on_device

    def forward(
        self, layer: recurrence.Layer, projected: Tensor, output: Tensor, h_n: Tensor, gates: Tensor | None
    ) -> None:
        refused = torch.ops.fastgru.cuda_gru_loop_forward(
            projected, _aligned(layer.w_hh), _aligned(layer.b_ih), _aligned(layer.b_hh), _aligned(layer.hx),
            layer.table, len(layer.sizes), recurrence.tf32(), self.loop, output, h_n, gates,
        )  # fmt: skip
        _raise_if(refused)

    def previous_states(self, layer: recurrence.Layer, output: Tensor, previous: Tensor) -> None:
        torch.ops.fastgru.cuda_gru_previous_states(
            _aligned(output), _aligned(layer.hx), layer.table, len(layer.sizes), previous
        )

    def gates(self, layer: recurrence.Layer, projected: Tensor, recurrent: Tensor, gates: Tensor) -> None:
        torch.ops.fastgru.cuda_gru_gates(projected, recurrent, layer.b_ih, layer.b_hh, gates)

    def backward(
        self,
        layer: recurrence.Layer,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        previous: Tensor,
        gates: Tensor,
        grad_gates: Tensor,
        grad_hx: Tensor,
    ) -> None:
        refused = torch.ops.fastgru.cuda_gru_loop_backward(
            _aligned(grad_output), _aligned(grad_h_n), _aligned(layer.w_hh), previous, _aligned(gates), layer.table,
            len(layer.sizes), recurrence.tf32(), self.loop, grad_gates, grad_hx,
        )  # fmt: skip
        _raise_if(refused)


KERNELS = _Kernels()
operators = recurrence.Operators(KERNELS)


def _or_the_next(kind: str) -> Callable[..., Any]:
    """An operator that hands to the next backend what is refused, unless this one was asked for by name."""

    def run(*arguments: Any) -> Any:
        try:
            return getattr(operators, kind)(*arguments)
        except _Refused as refused:
            hx: Tensor = arguments[3 if kind == "backward" else 1]
            _turned_down[_key(hx.device, hx.dtype, hx.size(2), hx.size(1), hx.size(0))] = str(refused)
            successor = registry.fall_back("cuda", SUCCESSORS, hx.device, hx.dtype, str(refused))
            return getattr(torch.ops.fastgru, f"{successor.name}_gru_{kind}")(*arguments)

    return run


gru_infer, gru_train, gru_backward = (_or_the_next(kind) for kind in ("infer", "train", "backward"))


@functools.cache
def _available() -> str | None:
    if _lib.load_error is not None:
        return _lib.load_error
    try:
        built_with, driver = torch.ops.fastgru.cuda_versions()
    except NotImplementedError:
        return (
            "this fastgru is built without its CUDA part; install its wheel for your CUDA, or build it with "
            "FASTGRU_CUDA=1 where there is an nvcc"
        )
    if torch.version.cuda is None:
        return "this torch is not built for CUDA; install a build for your GPU, see https://pytorch.org"
    # Within a major version an older driver runs what a newer toolkit compiled.
    if 0 < driver // 1000 < built_with // 1000:
        return (
            f"the driver runs CUDA {_version(driver)} and this build needs {built_with // 1000}.0; update the driver, "
            "or install the wheel of fastgru for an older CUDA"
        )
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; check the driver, and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"the GPU is of compute capability {major}.{minor} and 8.0 is the oldest it works with"
    try:
        torch.ops.fastgru.cuda_code_architecture(torch.cuda.current_device())
    except RuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("fastgru: ")
        return f"{reason}; build fastgru with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number // 10 % 100}"


def _supports(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype in recurrence.DTYPES else f"it has no kernels for {dtype}"


def _key(device: torch.device, dtype: torch.dtype, hidden: int, batch: int, directions: int) -> tuple[Any, ...]:
    return device.index, dtype, hidden, batch, directions, recurrence.tf32(), KERNELS.loop


@functools.lru_cache(maxsize=4096)
def _why_not(key: tuple[Any, ...]) -> str:
    return str(torch.ops.fastgru.cuda_gru_why_not(*key))


def _refuses(device: torch.device, dtype: torch.dtype, sizes: registry.Sizes) -> str | None:
    key = _key(device, dtype, sizes.hidden, sizes.batch, sizes.directions)
    return _turned_down.get(key) or _why_not(key) or None


def _wins(device: torch.device, dtype: torch.dtype, sizes: registry.Sizes | None) -> bool:
    return gpu_table.wins("cuda", device, dtype, sizes)


# What torch.compiler.assume_constant_result does, which would import the compiler.
_wins._dynamo_marked_constant = True  # type: ignore[attr-defined]

registry.register(
    registry.Backend(
        name="cuda", devices=("cuda",), priority=70, available=_available, supports=_supports, refuses=_refuses,
        wins=_wins,
    )
)  # fmt: skip
