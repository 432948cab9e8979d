"""Defines the operators of attention: schema, fake kernel and autograd, each once for all backends.

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
from fastgru.ops.library import LIBRARY, Pass, call, define_family, second_order

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
    grad_output, grad_lse, *tensors = ctx.saved_tensors
    inputs, others = tensors[:DIFFERENTIABLE], tensors[DIFFERENTIABLE:]

    def composite(*inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.attention_differentiable(*inputs, *others, *ctx.numbers)

    if not ctx.has_bias_grad:
        grad_grads = (*grad_grads[:-1], None)
    grads = second_order(composite, (grad_output, grad_lse), inputs, grad_grads, ctx.needs_input_grad)
    return *grads, *[None] * (_COUNT - DIFFERENTIABLE + 3)


_PASSES = {
    "forward": Pass(
        f"({_ARGUMENTS}) -> (Tensor output, Tensor lse, Tensor statistics)",
        _fake_forward,
        _save_forward,
        _forward_backward,
    ),
    "backward": Pass(
        f"(Tensor? grad_output, Tensor? grad_lse, {_ARGUMENTS}, Tensor output, Tensor statistics, "
        "bool need_bias_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
        _fake_backward,
        _save_backward,
        lambda ops: _double_backward,
    ),
}


def _define(backend: str, module: Any = None, implementation: registry.Implementation | None = None) -> AttentionOps:
    """``module`` has the kernels; without one the C++ library does."""
    kernels = () if module is None else (module.attention, module.attention_backward)
    return define_family("attention", backend, _PASSES, AttentionOps, kernels=kernels, implementation=implementation)


ATTENTION_OPS = {
    "reference": _define("reference", reference),
    "cpu": _define("cpu"),
    "triton": _define("triton", triton),
    "gluon": _define("gluon", gluon, registry.Implementation(wins=gluon.wins, covers=covers)),
}


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
