"""Additive (Bahdanau) attention: operators, autograd and the function that checks and calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastgru import _torch_private
from fastgru._torch_private import forward_mode
from fastgru.backends import reference_additive, registry
from fastgru.ops.attention import ArgumentError, _autocast, _lengths, _tensor
from fastgru.ops.schema import LIBRARY, _grad, call

_ARGUMENTS = "Tensor query, Tensor key, Tensor weight, Tensor value, Tensor? k_lengths"

LIBRARY.define(
    f"additive_attention({_ARGUMENTS}) -> (Tensor output, Tensor statistics)", tags=torch.Tag.pt2_compliant_tag
)
LIBRARY.define(
    f"additive_attention_backward(Tensor grad_output, {_ARGUMENTS}, Tensor output, Tensor statistics) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_weight, Tensor grad_value)",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward = torch.ops.fastgru.additive_attention.default
_backward = torch.ops.fastgru.additive_attention_backward.default
LIBRARY.impl(_forward, reference_additive.additive, "CompositeExplicitAutograd")
LIBRARY.impl(_backward, reference_additive.additive_backward, "CompositeExplicitAutograd")


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
    return *call(_backward, grad_output, *ctx.saved_tensors), None


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
        output = reference_additive.additive_differentiable(query, key, weight, value, k_lengths)
        first = _grad([output], leaves[1:], [leaves[0]], create_graph=True)
        pairs = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if g is not None and gg is not None]
        grads = _grad([g for g, _ in pairs], leaves, [gg for _, gg in pairs], create_graph=keep_graph)
    return *grads, None, None, None


torch.library.register_fake(_forward, _fake_forward, lib=LIBRARY)
torch.library.register_fake(_backward, _fake_backward, lib=LIBRARY)
torch.library.register_autograd(_forward, _differentiate, setup_context=_save_forward, lib=LIBRARY)
torch.library.register_autograd(_backward, _double_backward, setup_context=_save_backward, lib=LIBRARY)


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, k_lengths: Tensor | None = None
) -> Tensor:
    """softmax over keys j of weight . tanh(query_i + key_j), times value, in memory linear in the lengths.

    Runs on the backend ``reference`` alone, in plain torch on any device.

    Args:
        query, key: projected queries [B, Lq, H] and keys [B, Lk, H].
        value: [B, Lk, Dv].
        weight: [H].
        k_lengths: [B] integers: keys from these positions on are padding.

    Returns:
        [B, Lq, Dv]; 0, with zero gradients, for a sequence without keys.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        TypeError: something that is not a dense tensor in the place of one.
        RuntimeError: lengths out of range (on the CPU).
        BackendUnavailable: another backend was asked for by name.
    """
    tensors = (query, key, value, weight, k_lengths)
    if has_torch_function(tensors):
        return handle_torch_function(additive_attention, tensors, query, key, value, weight, k_lengths=k_lengths)
    for name, t, rank in (("query", query, 3), ("key", key, 3), ("value", value, 3), ("weight", weight, 1)):
        _tensor(name, t)
        if t.dim() != rank:
            raise ArgumentError(f"{name} must have {rank} dimensions, got {list(t.shape)}")
    query, key, value, weight = _autocast(query, key, value, weight)
    if not query.is_floating_point():
        raise ArgumentError(f"query must be floating, got {query.dtype}")
    for name, t in (("key", key), ("value", value), ("weight", weight)):
        if t.dtype is not query.dtype or t.device != query.device:
            raise ArgumentError(
                f"{name} must have query's dtype and device, {query.dtype} on {query.device}, "
                f"got {t.dtype} on {t.device}"
            )
    (B, _, H), keys = query.shape, key.shape[1]
    if key.shape != (B, keys, H) or value.shape[:2] != (B, keys) or weight.shape[0] != H:
        raise ArgumentError(
            "expected query [B, Lq, H], key [B, Lk, H], value [B, Lk, Dv] and weight [H], got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)} and {list(weight.shape)}"
        )
    k_lengths = _lengths("k_lengths", k_lengths, query)
    backend = registry.select(query.device, query.dtype).name
    if backend != "reference" and registry.requested() != registry.AUTO:
        raise registry.BackendUnavailable(
            f"backend {backend!r} has no additive attention, only 'reference' has; use_backend('auto') takes that"
        )
    if keys == 0:
        return ((query * weight) @ key.mT) @ value
    arguments = (query, key, weight, value, k_lengths)
    if _torch_private.are_functorch_transforms_active() or forward_mode._current_level >= 0:
        return reference_additive.additive_differentiable(*arguments)
    output: Tensor = call(_forward, *arguments)[0]
    return output
