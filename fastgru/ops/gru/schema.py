"""Defines the operators of the GRU: schema, fake kernel and autograd, each once for all backends.

One operator is one GRU layer, in one or both directions (D = 2 iff ``w_ih_reverse`` is given). Shapes: input [T, B, I],
or packed [N, I] with ``batch_sizes`` (int64 on the CPU, [T], never growing); hx and h_n [D, B, H]; output [T, B, D*H]
or [N, D*H]; weights as nn.GRU stores them. ``gates`` [D, N, 4*ceil16(H)], of ``cpu`` [D, N, 4*H] up to H = 8,
of ``cudnn`` [0], is opaque to all but the backend that made it.

The C++ library implements the ``cpu_*`` operators, and what the ``cuda_*`` operators launch; they exist, and can be
traced, without it. The ``triton_*`` operators load Triton when they are first called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.backends import registry
from fastgru.backends.triton import INTERPRETED
from fastgru.ops.gru import cuda, cudnn, reference, triton
from fastgru.ops.library import LIBRARY, Pass, call, define_family, second_order

_LAYER = (
    "Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, Tensor? batch_sizes"
)

# In the place of an operator's arguments that are left out.
NO_TENSORS = (None,) * 11


class GruOps(NamedTuple):
    """The operators of one backend, as overloads: the cheapest thing to call."""

    infer: torch._ops.OpOverload
    train: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def _fake_infer(input: Tensor, hx: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    directions, _, hidden = hx.shape
    reference.check_weights(input, hx, rest[:8])
    return input.new_empty(*input.shape[:-1], directions * hidden), input.new_empty(hx.shape)


def _fake_train(input: Tensor, hx: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    output, h_n = _fake_infer(input, hx, *rest)
    rows = input.shape[0] if input.dim() == 2 else input.shape[0] * input.shape[1]
    return output, h_n, input.new_empty(hx.shape[0], rows, 4 * reference.gate_stride(hx.shape[2]))


def _fake_train_cpu(input: Tensor, hx: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    output, h_n, gates = _fake_train(input, hx)
    # saved_units() of csrc/cpu/gru/types.h.
    return output, h_n, gates if hx.shape[2] > 8 else input.new_empty(*gates.shape[:2], 4 * hx.shape[2])


def _fake_train_without_gates(input: Tensor, hx: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_infer(input, hx, *rest), input.new_empty(0)


def _fake_backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, input: Tensor, hx: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    need_input_grad, need_weight_grad = rest[-2:]
    directions, _, hidden = hx.shape
    grad_input = input.new_empty(input.shape) if need_input_grad else input.new_empty(0)
    grad_hx = input.new_empty(hx.shape)
    if not need_weight_grad:
        return grad_input, grad_hx, *(input.new_empty(0) for _ in range(4))
    width = 3 * hidden
    shapes = [
        (directions, width, input.shape[-1]),
        (directions, width, hidden),
        (directions, width),
        (directions, width),
    ]
    return grad_input, grad_hx, *(input.new_empty(shape) for shape in shapes)


def _save_train(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.version = output[0]._version
    ctx.save_for_backward(*own_state(ctx.needs_input_grad, inputs), *inputs, output[0], output[2])


def _save_infer(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.version = output[0]._version
    ctx.save_for_backward(*inputs, output[0])


def own_state(need: tuple[bool, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """A copy of hx where no recurrent weight needs a gradient: nn.GRU does not keep hx then, and it may be overwritten,
    but the kernels read it."""
    hx = inputs[1]
    return () if hx is None or any(need[3::4]) else (hx.clone(),)


class _SavedOutput:
    """Hooks of a saved output that may have been overwritten."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.overwritten = False
        self.tensor: Tensor | None = None

    def pack(self, output: Tensor) -> None:
        self.tensor = output
        self.overwritten = output._version != self.version

    def unpack(self, _: None) -> Tensor | None:
        if not self.overwritten and self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(_OVERWRITTEN.format("the output of a GRU, between two backward passes"))
        return self.tensor


_OVERWRITTEN = "one of the variables needed for gradient computation has been modified by an inplace operation: {}"


def _unpack_unread(tensor: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError(_OVERWRITTEN.format("an argument of a GRU of which the second derivative is wanted"))
    return tensor


def despite_overwriting(
    ctx: Any, ops: GruOps, need: Sequence[bool], gates: bool, error: RuntimeError
) -> tuple[Tensor | None, ...]:
    """``ctx.saved_tensors`` where that raised ``error``, if what was overwritten is what nn.GRU on a CPU lets one
    overwrite: the output, which is then computed again, or what this backward pass does not read.

    Args:
        need: of each input whether its gradient is needed.
        gates: whether the gates were saved: without them backward reads every input.

    Raises:
        RuntimeError: torch's, for anything else.
    """
    output = _SavedOutput(getattr(ctx, "version", 0))
    try:
        raw = ctx._raw_saved_tensors
        at = len(raw) - (2 if gates else 1)
        # A tensor with hooks is not checked any more.
        raw[at].register_hooks(output.pack, output.unpack)
    except (RuntimeError, AttributeError):
        raise error from None  # the graph is gone, or it has them from the last time; AttributeError: another torch
    first = at - len(need)
    if not output.overwritten and gates and not torch.is_grad_enabled():
        assert output.tensor is not None
        one_step = output.tensor.dim() == 3 and output.tensor.size(0) == 1
        read = [any(need[2::4]), any(need[3::4]), need[0], need[1] or not one_step, False, False]
        # The reverse direction's weights come after the forward direction's; batch_sizes, the eleventh, is always read.
        for wanted, saved in zip((read + read[2:]), raw[first:at], strict=False):
            if not wanted:
                with contextlib.suppress(RuntimeError):  # None takes no hooks
                    saved.register_hooks(lambda tensor: tensor, _unpack_unread)
    tensors = list(ctx.saved_tensors)
    if output.overwritten:
        output.tensor = None  # until there is the right one
        inputs = tensors[first:at]
        with torch.no_grad():
            tensors[at] = output.tensor = call(ops.infer, *inputs, *NO_TENSORS[len(inputs) :])[0]
    return tuple(tensors)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    # Neither the flags, nor output and gates: nothing is differentiated through those, see _double_backward.
    ctx.save_for_backward(*inputs[:-4])


def run_backward(
    ops: GruOps,
    need: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    output: Tensor,
    gates: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Calls the backward operator and lays its results out as the gradients of the forward operator's arguments."""
    grad_input, grad_hx, *grad_weights = call(ops.backward, *grads[:2], *inputs, output, gates, need[0], any(need[2:]))
    result = [grad_input if need[0] else None, grad_hx if need[1] else None]
    for direction, first in enumerate((2, 6)):
        result += [g[direction] if wanted else None for g, wanted in zip(grad_weights, need[first:], strict=False)]
    return *result, None


def _train_backward(ops: GruOps) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:11]
        try:
            *inputs, output, gates = ctx.saved_tensors
        except RuntimeError as error:
            *inputs, output, gates = despite_overwriting(ctx, ops, need, True, error)
        if len(inputs) > len(need):
            inputs = with_own_state(inputs)
        return run_backward(ops, need[:10], grads, tuple(inputs), output, gates)

    return backward


def _infer_backward(ops: GruOps) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:11]
        try:
            *inputs, output = ctx.saved_tensors
        except RuntimeError as error:
            *inputs, output = despite_overwriting(ctx, ops, need, False, error)
        return run_backward(ops, need[:10], grads, tuple(inputs), output, None)

    return backward


def with_own_state(saved: list[Tensor | None]) -> list[Tensor | None]:
    """The inputs, of what was saved with own_state before them. A second derivative needs hx itself."""
    own, input, hx, *weights = saved
    return [input, hx if torch.is_grad_enabled() else own, *weights]


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the backward operator, total in grad_output, grad_h_n, input, hx and the weights."""
    grad_output, grad_h_n, *inputs, batch_sizes = ctx.saved_tensors

    def composite(*inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.gru_differentiable(*inputs, batch_sizes)

    # From the backward operator's results, which have a direction axis, to the forward operator's arguments.
    grad_grad_input, grad_grad_hx, *rest = grad_grads
    second = [grad_grad_input, grad_grad_hx]
    second += [None if gg is None else gg[direction] for direction in range(inputs[1].size(0)) for gg in rest]
    second += [None] * (len(inputs) - len(second))
    grads = second_order(composite, (grad_output, grad_h_n), inputs, second, ctx.needs_input_grad)
    return *grads, None, None, None, None, None


def _define(
    backend: str,
    kernels: tuple[Callable[..., Any], ...] = (),
    key: str = "CompositeExplicitAutograd",
    fake_train: Callable[..., Any] = _fake_train,
    implementation: registry.Implementation | None = None,
) -> GruOps:
    passes = {
        "infer": Pass(f"({_LAYER}) -> (Tensor output, Tensor h_n)", _fake_infer, _save_infer, _infer_backward),
        "train": Pass(
            f"({_LAYER}) -> (Tensor output, Tensor h_n, Tensor gates)", fake_train, _save_train, _train_backward
        ),
        "backward": Pass(
            f"(Tensor? grad_output, Tensor? grad_h_n, {_LAYER}, Tensor output, Tensor? gates, "
            "bool need_input_grad, bool need_weight_grad) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_w_ih, "
            "Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh)",
            _fake_backward,
            _save_backward,
            lambda ops: _double_backward,
        ),
    }
    return define_family("gru", backend, passes, GruOps, kernels, key, implementation)


GRU_OPS = {
    "reference": _define("reference", (reference.gru_differentiable, reference.gru_train, reference.gru_backward)),
    "triton": _define(
        "triton",
        (triton.operators.infer, triton.operators.train, triton.operators.backward),
        "CompositeExplicitAutograd" if INTERPRETED else "CUDA",
        implementation=registry.Implementation(wins=triton.wins),
    ),
    "cuda": _define(
        "cuda",
        (cuda.gru_infer, cuda.gru_train, cuda.gru_backward),
        "CUDA",
        implementation=registry.Implementation(wins=cuda.wins, refuses=cuda.refuses),
    ),
    # The C++ library has the kernels.
    "cpu": _define("cpu", fake_train=_fake_train_cpu),
    "cudnn": _define(
        "cudnn", (cudnn.gru_infer, cudnn.gru_train, cudnn.gru_backward), fake_train=_fake_train_without_gates
    ),
}

# What fastgru/ops/gru/cuda.py launches; see recurrence.py beside it. The loops say why they do not run, or "".
LIBRARY.define(
    "cuda_gru_loop_forward(Tensor projected, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor hx, Tensor? table, "
    "int steps, bool tf32, str loop, Tensor(a!) output, Tensor(b!) h_n, Tensor(c!)? gates) -> str"
)
LIBRARY.define(
    "cuda_gru_loop_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor w_hh, Tensor previous, Tensor gates, "
    "Tensor? table, int steps, bool tf32, str loop, Tensor(a!) grad_gates, Tensor(b!) grad_hx) -> str"
)
LIBRARY.define(
    "cuda_gru_previous_states(Tensor output, Tensor hx, Tensor? table, int steps, Tensor(a!) previous) -> ()"
)
LIBRARY.define("cuda_gru_gates(Tensor projected, Tensor recurrent, Tensor? b_ih, Tensor? b_hh, Tensor(a!) gates) -> ()")
LIBRARY.define(
    "cuda_gru_why_not(int device, ScalarType dtype, int hidden, int batch, int directions, bool tf32, str loop) -> str"
)
