"""Defines the operators of additive attention: schema, fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.ops.additive import reference
from fastgru.ops.library import Pass, call, define_family, second_order

_ARGUMENTS = "Tensor query, Tensor key, Tensor weight, Tensor value, Tensor? k_lengths"


class AdditiveOps(NamedTuple):
    """The operators of one backend."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def _fake_forward(query: Tensor, key: Tensor, weight: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(2, *query.shape[:2], dtype=dtype)


def _fake_backward(grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in rest[:4])


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _forward_backward(ops: AdditiveOps) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        return *call(ops.backward, grad_output, *ctx.saved_tensors), None

    return backward


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-2])


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the backward operator, total in grad_output, query, key, weight and value."""
    grad_output, *inputs, k_lengths = ctx.saved_tensors

    def composite(*inputs: Any) -> tuple[Tensor]:
        query, key, weight, value = inputs
        return (reference.additive_differentiable(query, key, weight, value, k_lengths),)

    grads = second_order(composite, [grad_output], inputs, grad_grads, ctx.needs_input_grad)
    return *grads, None, None, None


_PASSES = {
    "forward": Pass(
        f"({_ARGUMENTS}) -> (Tensor output, Tensor statistics)", _fake_forward, _save_forward, _forward_backward
    ),
    "backward": Pass(
        f"(Tensor grad_output, {_ARGUMENTS}, Tensor output, Tensor statistics) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_weight, Tensor grad_value)",
        _fake_backward,
        _save_backward,
        lambda ops: _double_backward,
    ),
}
_KERNELS = (reference.additive, reference.additive_backward)

ADDITIVE_OPS = {"reference": define_family("additive", "reference", _PASSES, AdditiveOps, _KERNELS)}
