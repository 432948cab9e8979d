"""Checks the arguments of additive (Bahdanau) attention, and calls the operator of the backend that is chosen."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastgru import _torch_private
from fastgru._torch_private import forward_mode
from fastgru.backends import registry
from fastgru.ops.additive import reference
from fastgru.ops.additive.schema import ADDITIVE_OPS
from fastgru.ops.attention.arguments import ArgumentError, _lengths, _tensor
from fastgru.ops.library import call
from fastgru.ops.numerics import autocast


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
    query, key, value, weight = autocast(query, key, value, weight)
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
    ops = ADDITIVE_OPS[registry.select("additive", query.device, query.dtype).name]
    if keys == 0:
        return ((query * weight) @ key.mT) @ value
    arguments = (query, key, weight, value, k_lengths)
    if _torch_private.are_functorch_transforms_active() or forward_mode._current_level >= 0:
        return reference.additive_differentiable(*arguments)
    output: Tensor = call(ops.forward, *arguments)[0]
    return output
