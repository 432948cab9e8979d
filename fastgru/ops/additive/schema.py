"""The operators of additive attention: schema, fake kernel and autograd, each defined once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgru.backends import registry
from fastgru.ops.additive import reference
from fastgru.ops.library import LIBRARY, call, gradients

_ARGUMENTS = "Tensor query, Tensor key, Tensor weight, Tensor value, Tensor? k_lengths"

LIBRARY.define(
    f"reference_additive_forward({_ARGUMENTS}) -> (Tensor output, Tensor statistics)", tags=torch.Tag.pt2_compliant_tag
)
LIBRARY.define(
    f"reference_additive_backward(Tensor grad_output, {_ARGUMENTS}, Tensor output, Tensor statistics) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_weight, Tensor grad_value)",
    tags=torch.Tag.pt2_compliant_tag,
)
FORWARD = torch.ops.fastgru.reference_additive_forward.default
BACKWARD = torch.ops.fastgru.reference_additive_backward.default
LIBRARY.impl(FORWARD, reference.additive, "CompositeExplicitAutograd")
LIBRARY.impl(BACKWARD, reference.additive_backward, "CompositeExplicitAutograd")


registry.implement("additive", "reference")


def _fake_forward(query: Tensor, key: Tensor, weight: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(2, *query.shape[:2], dtype=dtype)


def _fake_backward(grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in rest[:4])


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 5
    return *call(BACKWARD, grad_output, *ctx.saved_tensors), None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-2])


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the backward operator, through the composite: nothing flows through output and statistics."""
    *tensors, k_lengths = ctx.saved_tensors
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves: list[Any] = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        query, key, weight, value = leaves[1:]
        output = reference.additive_differentiable(query, key, weight, value, k_lengths)
        first = gradients([output], leaves[1:], [leaves[0]], create_graph=True)
        pairs = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if g is not None and gg is not None]
        grads = gradients([g for g, _ in pairs], leaves, [gg for _, gg in pairs], create_graph=keep_graph)
    return *grads, None, None, None


torch.library.register_fake(FORWARD, _fake_forward, lib=LIBRARY)
torch.library.register_fake(BACKWARD, _fake_backward, lib=LIBRARY)
torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save_forward, lib=LIBRARY)
torch.library.register_autograd(BACKWARD, _double_backward, setup_context=_save_backward, lib=LIBRARY)
