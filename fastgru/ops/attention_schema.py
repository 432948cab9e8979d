"""The attention operators of every backend: schema, fake kernel and autograd, each defined once.

``<backend>_attention`` returns the output [B, Hq, Lq, Dv], laid out like ``query``; the log of the sum of the
exponentials of the scores, lse [B, Hq, Lq], in the type computed in; and for the backward pass statistics
[2, B, Hq, Lq] of that type: each row's reference m, in a unit of the backend's own, and its sum l of exp(s - m), both 0
where it saw nothing. (lse alone would not do: that of large scores is rounded by more than 1.) Arguments and equations
are those of :mod:`fastgru.backends.reference_attention`; every tensor may be strided. Only query, key, value and bias
have gradients, through output and lse. The second derivative differentiates the reference's composite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru import _lib, _torch_private
from fastgru.backends import gluon, reference_attention, triton_attention
from fastgru.backends.reference_attention import Attention, empty_like_layout
from fastgru.ops.schema import LIBRARY, _grad, call

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? q_lengths, Tensor? k_lengths, "
    "Tensor? alibi_slopes, Tensor? dropout_seed, float dropout_p, float scale, float softcap, int window_left, "
    "int window_right, bool bottom_right"
)
_COUNT = len(Attention._fields)
# Arguments that have a gradient: query, key, value and bias come first. Then other tensors, then numbers.
_DIFFERENTIABLE = 4
TENSORS = 9


class AttentionOps(NamedTuple):
    """The operators of one backend."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = Attention(*arguments)
    rows, dtype = a.query.shape[:3], torch.float64 if a.query.dtype is torch.float64 else torch.float32
    lse, statistics = (a.query.new_empty(shape, dtype=dtype) for shape in (rows, (2, *rows)))
    return empty_like_layout(a.query, a.value.shape[3]), lse, statistics


def _fake_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, _, _, need_bias_grad = arguments
    a = Attention(*inputs)
    query, key, value = (empty_like_layout(t, t.shape[3]) for t in (a.query, a.key, a.value))
    wants_bias = need_bias_grad and a.bias is not None
    return query, key, value, a.query.new_empty(a.bias.shape if wants_bias and a.bias is not None else 0)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    result, _, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.numbers = inputs[TENSORS:]
    ctx.save_for_backward(*inputs[:TENSORS], result, statistics)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    # Neither output, statistics nor the flag: nothing is differentiated through those.
    ctx.numbers = inputs[2 + TENSORS : 2 + _COUNT]
    ctx.has_bias_grad = inputs[-1]
    ctx.save_for_backward(*inputs[: 2 + TENSORS])


def _run_backward(
    ops: AttentionOps, ctx: Any, need: tuple[bool, ...], grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value and bias, None for those not needed."""
    *tensors, output, statistics = ctx.saved_tensors
    grads = call(ops.backward, grad_output, grad_lse, *tensors, *ctx.numbers, output, statistics, need[3])
    return tuple([grad if needed else None for grad, needed in zip(grads, need, strict=False)])


def _forward_backward(ops: AttentionOps) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, _: None = None
    ) -> tuple[Tensor | None, ...]:
        grads = _run_backward(ops, ctx, ctx.needs_input_grad, grad_output, grad_lse)
        return *grads, *[None] * (_COUNT - _DIFFERENTIABLE)

    return backward


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
        found = _run_backward(ctx.ops, ctx, ctx.needs_input_grad[2 : 2 + _DIFFERENTIABLE], *grads)
        return None, None, *found, None, None, None, None, None


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the backward operator, total in grad_output, grad_lse, query, key, value and bias."""
    tensors = ctx.saved_tensors
    keep_graph = torch.is_grad_enabled()
    count = 2 + _DIFFERENTIABLE
    with torch.enable_grad():
        # An alias for what is already in a graph, so that a third derivative can be taken.
        leaves: list[Any] = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in tensors[:count]
        ]
        inputs = leaves[2:]
        outputs = reference_attention.attention_differentiable(*inputs, *tensors[count:], *ctx.numbers)
        seeds = [pair for pair in zip(outputs, leaves[:2], strict=True) if pair[1] is not None]
        first = _grad([out for out, _ in seeds], inputs, [seed for _, seed in seeds], create_graph=True)
        if not ctx.has_bias_grad:
            first[-1] = None
        pairs = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if g is not None and gg is not None]
        wanted = [leaf if need else None for leaf, need in zip(leaves, ctx.needs_input_grad, strict=False)]
        grads = _grad([g for g, _ in pairs], wanted, [gg for _, gg in pairs], create_graph=keep_graph)
    return *grads, *[None] * (_COUNT - _DIFFERENTIABLE + 3)


def _define(backend: str) -> AttentionOps:
    forward, backward = f"{backend}_attention", f"{backend}_attention_backward"
    tag = torch.Tag.pt2_compliant_tag
    LIBRARY.define(f"{forward}({_ARGUMENTS}) -> (Tensor output, Tensor lse, Tensor statistics)", tags=tag)
    LIBRARY.define(
        f"{backward}(Tensor? grad_output, Tensor? grad_lse, {_ARGUMENTS}, Tensor output, Tensor statistics, "
        "bool need_bias_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
        tags=tag,
    )
    ops = AttentionOps(*(getattr(torch.ops.fastgru, name).default for name in (forward, backward)))
    torch.library.register_fake(ops.forward, _fake_forward, lib=LIBRARY)
    torch.library.register_fake(ops.backward, _fake_backward, lib=LIBRARY)
    torch.library.register_autograd(ops.forward, _forward_backward(ops), setup_context=_save_forward, lib=LIBRARY)
    torch.library.register_autograd(ops.backward, _double_backward, setup_context=_save_backward, lib=LIBRARY)
    return ops


ATTENTION_OPS = {name: _define(name) for name in ("reference", "cpu", "triton", "gluon")}

# The C++ library implements those of "cpu".
for _name, _module in (("reference", reference_attention), ("triton", triton_attention), ("gluon", gluon)):
    LIBRARY.impl(ATTENTION_OPS[_name].forward, _module.attention, "CompositeExplicitAutograd")
    LIBRARY.impl(ATTENTION_OPS[_name].backward, _module.attention_backward, "CompositeExplicitAutograd")


# ---- without options, on the CPU, in eager mode ----


def _define_plain() -> AttentionOps:
    forward, backward = "cpu_plain_attention", "cpu_plain_attention_backward"
    arguments = (
        "Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool causal, bool bottom_right, "
        "bool grouped"
    )
    LIBRARY.define(f"{forward}({arguments}) -> (Tensor output, Tensor statistics)")
    LIBRARY.define(
        f"{backward}(Tensor grad_output, {arguments}, Tensor output, Tensor statistics) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    )
    return AttentionOps(*(getattr(torch.ops.fastgru, name).default for name in (forward, backward)))


# What "cpu" computes, with few arguments: it takes longer to pass fifteen of them than to compute a small problem. The
# mask is bool and may have fewer than four dimensions. No fake kernels and no autograd: compilers see the others.
PLAIN_OPS = _define_plain()
plain_forward, _plain_backward = map(_torch_private.without_wrapper, PLAIN_OPS)


class PlainAttentionFunction(torch.autograd.Function):
    """PLAIN_OPS with gradients: takes query, key, value, mask and their other arguments as a tuple; returns the output
    alone. Its calls take the shortest way, as little as that is, for it adds up to half of a small problem."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        # Not in a frame that Dynamo traces, as it does those below a break of its graph.
        direct = None if torch.compiler.is_compiling() else _lib.direct
        found = None if direct is None else direct.attention_train(query, key, value, mask, *options)
        output, statistics = plain_forward(query, key, value, mask, *options) if found is None else found
        ctx.options = options
        ctx.save_for_backward(query, key, value, mask, output, statistics)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, statistics = ctx.saved_tensors
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            arguments = grad, query, key, value, mask, *ctx.options, output, statistics
            found = None if _lib.direct is None else _lib.direct.attention_backward(*arguments)
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
