"""The attention operators of every backend: schema, fake kernel and autograd, each defined once.

``<backend>_attention_forward`` returns the output [B, Hq, Lq, Dv], laid out like ``query``; the log of the sum of the
exponentials of the scores, lse [B, Hq, Lq], in the type computed in; and for the backward pass statistics
[2, B, Hq, Lq] of that type: each row's reference m, in a unit of the backend's own, and its sum l of exp(s - m), both 0
where it saw nothing. (lse alone would not do: that of large scores is rounded by more than 1.) Arguments and equations
are those of :mod:`fastgru.ops.attention.reference`; every tensor may be strided. Only query, key, value and bias
have gradients, through output and lse. The second derivative differentiates the reference's composite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgru.backends import registry
from fastgru.backends.gluon import covers
from fastgru.ops.attention import gluon, reference, triton
from fastgru.ops.attention.arguments import Attention, empty_like_layout
from fastgru.ops.library import LIBRARY, call, gradients

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? q_lengths, Tensor? k_lengths, "
    "Tensor? alibi_slopes, Tensor? dropout_seed, float dropout_p, float scale, float softcap, int window_left, "
    "int window_right, bool bottom_right"
)
_COUNT = len(Attention._fields)

# Arguments that have a gradient: query, key, value and bias come first. Then other tensors, then numbers.
DIFFERENTIABLE = 4
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


def run_backward(
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
        grads = run_backward(ops, ctx, ctx.needs_input_grad, grad_output, grad_lse)
        return *grads, *[None] * (_COUNT - DIFFERENTIABLE)

    return backward


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the backward operator, total in grad_output, grad_lse, query, key, value and bias."""
    tensors = ctx.saved_tensors
    keep_graph = torch.is_grad_enabled()
    count = 2 + DIFFERENTIABLE
    with torch.enable_grad():
        # An alias for what is already in a graph, so that a third derivative can be taken.
        leaves: list[Any] = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in tensors[:count]
        ]
        inputs = leaves[2:]
        outputs = reference.attention_differentiable(*inputs, *tensors[count:], *ctx.numbers)
        seeds = [pair for pair in zip(outputs, leaves[:2], strict=True) if pair[1] is not None]
        first = gradients([out for out, _ in seeds], inputs, [seed for _, seed in seeds], create_graph=True)
        if not ctx.has_bias_grad:
            first[-1] = None
        pairs = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if g is not None and gg is not None]
        wanted = [leaf if need else None for leaf, need in zip(leaves, ctx.needs_input_grad, strict=False)]
        grads = gradients([g for g, _ in pairs], wanted, [gg for _, gg in pairs], create_graph=keep_graph)
    return *grads, *[None] * (_COUNT - DIFFERENTIABLE + 3)


def _define(backend: str) -> AttentionOps:
    forward, backward = f"{backend}_attention_forward", f"{backend}_attention_backward"
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

for _name in ("reference", "cpu", "triton"):
    registry.implement("attention", _name)
registry.implement("attention", "gluon", registry.Implementation(wins=gluon.wins, covers=covers))


# The C++ library implements those of "cpu".
for _name, _module in (("reference", reference), ("triton", triton), ("gluon", gluon)):
    LIBRARY.impl(ATTENTION_OPS[_name].forward, _module.attention, "CompositeExplicitAutograd")
    LIBRARY.impl(ATTENTION_OPS[_name].backward, _module.attention_backward, "CompositeExplicitAutograd")


# ---- without options, on the CPU, in eager mode ----


def _define_plain() -> AttentionOps:
    forward, backward = "cpu_attention_plain_forward", "cpu_attention_plain_backward"
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
