"""Runs attention in eager mode: on the fast path where it applies, else with a lighter autograd than the operators'."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgru import _torch_private, fast_path
from fastgru._torch_private import forward_mode
from fastgru.backends import registry
from fastgru.ops.attention.arguments import ArgumentError, Attention
from fastgru.ops.attention.schema import ATTENTION_OPS, DIFFERENTIABLE, PLAIN_OPS, TENSORS, AttentionOps, run_backward

# Tensors that no one has given a meaning of their own.
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling

# What torch puts before the message of a failed check in C++.
_PLACE_IN_SOURCE = re.compile(r"^\w+, \S+\.(cpp|h|inc):\d+, ")


class AttentionFunction(torch.autograd.Function):
    """What the forward operator's autograd does, at a fraction of its cost per call: for eager mode.

    Arguments: the operators, those of the forward operator that are no tensors, as one tuple, and the tensors.
    """

    @staticmethod
    def forward(ctx: Any, ops: AttentionOps, numbers: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with _torch_private.below_autograd():
            output, lse, statistics = ops.forward(*tensors, *numbers)
        ctx.set_materialize_grads(False)
        ctx.ops, ctx.numbers = ops, numbers
        ctx.save_for_backward(*tensors, output, statistics)
        return output, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = run_backward(ctx.ops, ctx, ctx.needs_input_grad[2 : 2 + DIFFERENTIABLE], *grads)
        return None, None, *found, None, None, None, None, None


plain_forward, _plain_backward = map(_torch_private.without_wrapper, PLAIN_OPS)


class PlainAttentionFunction(torch.autograd.Function):
    """PLAIN_OPS with gradients: takes query, key, value, mask and their other arguments as a tuple; returns the output
    alone. Its calls take the shortest way, as little as that is, for it adds up to half of a small problem."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        # Not in a frame that Dynamo traces, as it does those below a break of its graph.
        functions = None if torch.compiler.is_compiling() else fast_path.functions
        found = None if functions is None else functions.attention_train(query, key, value, mask, *options)
        output, statistics = plain_forward(query, key, value, mask, *options) if found is None else found
        ctx.options = options
        ctx.save_for_backward(query, key, value, mask, output, statistics)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, statistics = ctx.saved_tensors
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            arguments = grad, query, key, value, mask, *ctx.options, output, statistics
            functions = fast_path.functions
            found = None if functions is None else functions.attention_backward(*arguments)
            return *(_plain_backward(*arguments) if found is None else found), None, None
        # To be differentiated again, or compiled, which the operator of all arguments can be.
        scale, causal, bottom_right, _ = ctx.options
        mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
        scale = query.shape[3] ** -0.5 if scale is None else scale
        right = 0 if causal else -1
        tensors = query, key, value, None, mask, None, None, None, None
        arguments = Attention(*tensors, 0.0, scale, 0.0, -1, right, bottom_right)
        found = ATTENTION_OPS["cpu"].backward(grad, None, *arguments, output, statistics, False)
        return *found[:3], None, None


# Without Function's own wrapper, which is for the transforms of torch.func.
plain_attention_with_gradients: Callable[..., Tensor] = _torch_private.plain_apply(PlainAttentionFunction)


def run(ops: AttentionOps, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or _torch_private.is_tracing():
        output, lse, _ = ops.forward(*arguments)
        return output, lse
    try:
        if torch.is_grad_enabled():
            q, k, v, bias = arguments[:4]
            if q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad):
                return AttentionFunction.apply(ops, arguments[TENSORS:], *arguments[:TENSORS])  # type: ignore[no-any-return, no-untyped-call]
        # No gradient to record: below autograd, whose way through Python is longer than a small problem.
        with _torch_private.below_autograd():
            output, lse, _ = ops.forward(*arguments)
        return output, lse
    except RuntimeError as error:
        message = _PLACE_IN_SOURCE.sub("", str(error))
        if message == str(error):
            raise
        raise ArgumentError(message) from None


def at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    bottom_right: bool,
    grouped: bool,
) -> Tensor | None:
    """Attention without options, where the operators of few arguments take it: on the CPU in eager mode. They do the
    checks themselves, for the ones below take as long as a small problem. None: not such a problem, or not a sound
    one: the general path reports errors."""
    if _is_compiling():
        return None
    options = scale, causal, bottom_right, grouped
    functions = fast_path.lookup("attention", "cpu", query.dtype) if type(query) in _PLAIN else None
    if functions is not None:
        output = functions.attention(query, key, value, mask, *options)
        if output is True:
            return plain_attention_with_gradients(query, key, value, mask, options)
        if output is not None:
            return output  # type: ignore[no-any-return]
    if (
        not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        or _torch_private.len_torch_function_stack()
        or not (query.is_cpu and query.dim() == 4)
        or not (mask is None or (type(mask) is Tensor and mask.dtype is torch.bool))
        or _torch_private.is_any_autocast_enabled()
        or _torch_private.is_tracing()
        or _torch_private.are_functorch_transforms_active()
        or forward_mode._current_level >= 0
    ):
        return None
    try:
        if registry.select("attention", "cpu", query.dtype).name != "cpu":
            return None
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return plain_attention_with_gradients(query, key, value, mask, options)
        return plain_forward(query, key, value, mask, *options)[0]  # type: ignore[no-any-return]
    except RuntimeError:
        return None
