"""Checks the arguments of attention, and calls the operators of the backend that the registry picks."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastgru import _torch_private
from fastgru._torch_private import forward_mode
from fastgru.backends import registry
from fastgru.ops.attention import gluon
from fastgru.ops.attention.arguments import (
    ArgumentError,
    Attention,
    _broadcastable,
    _check_tensors,
    _lengths,
    _number,
    _tensor,
    _window,
    as_mask,
    is_causal_bias,
)
from fastgru.ops.attention.eager import at_once, run
from fastgru.ops.attention.reference import attention_differentiable, hiding_product, hiding_scores
from fastgru.ops.attention.schema import ATTENTION_OPS, AttentionOps
from fastgru.ops.nested import from_padded, to_padded
from fastgru.ops.numerics import autocast


def _choose(arguments: tuple[Any, ...]) -> AttentionOps:
    """The operators to call: those of a backend, or under ``auto`` of two, one for each direction."""
    query: Tensor = arguments[0]
    backend = registry.select("attention", query.device, query.dtype)
    if not registry.goes_by_problem("attention", backend):
        return ATTENTION_OPS[backend.name]
    problems: list[gluon.Pass | None] = [None, None]
    if not torch.compiler.is_compiling():
        problems = [gluon.Pass(Attention(*arguments), backward) for backward in (False, True)]
    names = [registry.fastest("attention", query.device, query.dtype, p).name for p in problems]
    return AttentionOps(ATTENTION_OPS[names[0]].forward, ATTENTION_OPS[names[1]].backward)


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    dropout_p: float = ...,
    causal: bool = ...,
    causal_align: str = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: tuple[int, int] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    q_lengths: Tensor | None = ...,
    k_lengths: Tensor | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    dropout_p: float = ...,
    causal: bool = ...,
    causal_align: str = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    window: tuple[int, int] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    q_lengths: Tensor | None = ...,
    k_lengths: Tensor | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    causal_align: str = "bottom_right",
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale * query key^T) value, in memory linear in the lengths.

    Args:
        query: [B, Hq, Lq, D]. Any strides; float32, float64, bfloat16 or float16.
        key, value: [B, Hk, Lk, D] and [B, Hk, Lk, Dv].
        attn_mask: broadcastable to [B, Hq, Lq, Lk]. bool: True may be seen. Floating: added to the scores;
            -inf hides, as False does. Or a causal bias of torch.nn.attention.bias.
        bias: floating, broadcastable likewise, added to the scores. Has a gradient, as a floating attn_mask has.
        dropout_p: probability in [0, 1] of dropping a weight. Its seed comes from torch's generator.
        causal: no query sees a key beyond its diagonal.
        causal_align: "bottom_right": the diagonal ends at the last query and the last key; "top_left": it starts at the
            first ones. Also where ``window`` and ``alibi_slopes`` have their diagonal.
        scale: factor of the scores, 1 / sqrt(D) by default.
        enable_gqa: Hq may be a multiple of Hk: query head h uses key head h * Hk // Hq.
        window: keys to the left and to the right of the diagonal that may be seen; -1 for no bound.
        softcap: scores become softcap * tanh(score / softcap), before bias and ALiBi; 0 for none.
        alibi_slopes: [Hq] or [B, Hq], without gradient: slope * distance from the diagonal is taken from the scores.
        q_lengths, k_lengths: [B] integers: queries and keys from these positions on are padding.
        deterministic: accepted; every backend here is always deterministic.
        return_lse: also return log sum exp of the scores, differentiable.

    Returns:
        [B, Hq, Lq, Dv], laid out in memory as query is. With return_lse also lse [B, Hq, Lq], in float32 (float64 for
        float64). A query that sees no key, padding included, gives 0, lse -inf and zero gradients. What a query may not
        see has no influence on it, not even NaN.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        TypeError: something that is not a dense tensor in the place of one, or a tensor that requires a gradient in the
            place of a number or of ``alibi_slopes``.
        RuntimeError: lengths out of range (on the CPU; on a GPU they are clamped).
        BackendUnavailable: the backend asked for cannot run this.
    """
    if scale is not None and type(scale) is not float:
        scale = _number("scale", scale)
    if type(dropout_p) is not float or type(softcap) is not float:
        dropout_p, softcap = _number("dropout_p", dropout_p), _number("softcap", softcap)
    causal = causal is True or bool(causal)
    if (
        bias is None
        and dropout_p == 0
        and causal_align in ("bottom_right", "top_left")
        and type(window) is tuple
        and window == (-1, -1)
        and softcap == 0
        and alibi_slopes is None
        and q_lengths is None
        and k_lengths is None
        and not return_lse
    ):
        output = at_once(query, key, value, attn_mask, scale, causal, causal_align == "bottom_right", enable_gqa)
        if output is not None:
            return output
    attn_mask, bias = (as_mask(t, query) if is_causal_bias(t) else t for t in (attn_mask, bias))
    tensors = (query, key, value, attn_mask, bias, alibi_slopes, q_lengths, k_lengths)
    if has_torch_function(tensors):
        function: Any = flash_attention
        return handle_torch_function(  # type: ignore[no-any-return]
            function,
            tensors,
            query,
            key,
            value,
            attn_mask=attn_mask,
            bias=bias,
            dropout_p=dropout_p,
            causal=causal,
            causal_align=causal_align,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            q_lengths=q_lengths,
            k_lengths=k_lengths,
            deterministic=deterministic,
            return_lse=return_lse,
        )
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.is_nested or t.layout is not torch.strided:
            _tensor(name, t)
    query, key, value = autocast(query, key, value)
    _check_tensors(query, key, value)
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ArgumentError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}: pass enable_gqa=True to share key heads"
        )
    if causal_align not in ("bottom_right", "top_left"):
        raise ArgumentError(f"causal_align must be 'bottom_right' or 'top_left', got {causal_align!r}")
    if not 0 <= dropout_p <= 1:
        raise ArgumentError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    if not 0 <= softcap < math.inf:
        raise ArgumentError(f"softcap must be finite and not negative, got {softcap}")
    left, right = _window(window, query, key)
    if causal:
        right = 0
    mask = None
    if attn_mask is not None:
        attn_mask = _broadcastable("attn_mask", attn_mask, query, key)
        if attn_mask.dtype is torch.bool:
            mask = attn_mask
        elif not attn_mask.dtype.is_floating_point:
            raise ArgumentError(f"attn_mask must be bool or floating, got {attn_mask.dtype}")
    if bias is not None:
        bias = _broadcastable("bias", bias, query, key)
        if not bias.dtype.is_floating_point:
            raise ArgumentError(f"bias must be floating, got {bias.dtype}")
    if attn_mask is not None and mask is None:
        bias = attn_mask if bias is None else attn_mask + bias
    if bias is not None:
        bias = bias.to(query.dtype)
    if alibi_slopes is not None:
        _tensor("alibi_slopes", alibi_slopes)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise TypeError("alibi_slopes has no gradient: detach it, or pass what it stands for as bias")
        if alibi_slopes.shape not in ((query.shape[1],), (query.shape[0], query.shape[1])):
            raise ArgumentError(
                f"alibi_slopes must be [Hq] = [{query.shape[1]}] or [B, Hq], got {list(alibi_slopes.shape)}"
            )
        wide = torch.float64 if query.dtype is torch.float64 else torch.float32
        alibi_slopes = alibi_slopes.detach().to(query.device, wide)
        alibi_slopes = alibi_slopes.unsqueeze(0) if alibi_slopes.dim() == 1 else alibi_slopes
    if query.shape[3] == 0:
        # A column of zeros: every score is 0, whatever the scale.
        query, key = F.pad(query, (0, 1)), F.pad(key, (0, 1))
        scale = 1.0
    seed, everything = None, dropout_p == 1
    if everything:
        dropout_p = 0.0
    elif dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=query.device)
    arguments = (
        query,
        key,
        value,
        bias,
        mask,
        _lengths("q_lengths", q_lengths, query),
        _lengths("k_lengths", k_lengths, query),
        alibi_slopes,
        seed,
        float(dropout_p),
        1 / math.sqrt(query.shape[3]) if scale is None else float(scale),
        float(softcap),
        left,
        right,
        causal_align == "bottom_right",
    )
    if query.shape[1] == 0:
        scores = query @ key[:, :0].mT
        output, lse = scores @ value[:, :0], scores.sum(-1)
    elif _torch_private.are_functorch_transforms_active() or forward_mode._current_level >= 0:
        output, lse = attention_differentiable(*arguments)
    else:
        output, lse = run(_choose(arguments), arguments)
    if everything:
        # A mask, because zero times NaN is not zero.
        output = output.masked_fill(torch.ones((), dtype=torch.bool, device=output.device), 0)
    return (output, lse) if return_lse else output


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: [..., L, E]; [..., H, L, E] with ``enable_gqa``.
        key, value: [..., S, E] and [..., S, Ev]. Leading sizes are broadcast, heads only without ``enable_gqa``. All
            three may be nested tensors, of either layout, with ragged L and S: they are padded for the computation.
        attn_mask: broadcastable to [..., L, S]: bool, True may be seen, or floating, added to the scores. Or a causal
            bias of torch.nn.attention.bias.
        is_causal: a query sees the keys up to its own index (the diagonal starts at the top left).

    Returns:
        [..., L, Ev].

    Raises:
        RuntimeError: as torch, also where :func:`flash_attention` raises ValueError; both attn_mask and is_causal.
        TypeError: as :func:`flash_attention`.
    """
    if attn_mask is not None and is_causal:
        if is_causal_bias(attn_mask):
            raise ValueError("CausalBias should not be used with causal=True")
        raise RuntimeError(
            "scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True, got both"
        )
    if scale is not None and type(scale) is not float:
        scale = _number("scale", scale)
    if type(dropout_p) is not float:
        dropout_p = _number("dropout_p", dropout_p)
    is_causal = is_causal is True or bool(is_causal)
    if dropout_p == 0:
        output = at_once(query, key, value, attn_mask, scale, is_causal, False, enable_gqa)
        if output is not None:
            return output
    options = dropout_p, is_causal, scale, enable_gqa
    if is_causal_bias(attn_mask):
        return _causal_attention(query, key, value, attn_mask, *options)
    tensors = (query, key, value, attn_mask)
    for name, t in zip(("query", "key", "value", "attn_mask"), tensors, strict=True):
        if not isinstance(t, Tensor) and (t is not None or name != "attn_mask"):
            raise TypeError(f"scaled_dot_product_attention(): argument '{name}' must be Tensor, not {type(t).__name__}")
    if has_torch_function(tensors):
        return handle_torch_function(scaled_dot_product_attention, tensors, *tensors, *options)
    if query.is_nested or key.is_nested or value.is_nested:
        return _nested_attention(query, key, value, attn_mask, *options)
    query, key, value = autocast(query, key, value)
    if not query.dtype is key.dtype is value.dtype or not query.device == key.device == value.device:
        word, what = ("device", "device type") if query.dtype is key.dtype is value.dtype else ("dtype", "dtype")
        q, k, v = (getattr(t, word) for t in (query, key, value))
        raise ArgumentError(
            f"Expected query, key, and value to have the same {what}, but got query.{word}: {q} key.{word}: {k} "
            f"and value.{word}: {v} instead."
        )
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise ArgumentError(
            f"Expected query, key, and value to all be at least 2 dimensional, but got query.dim: {query.dim()} "
            f"key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if attn_mask is not None and attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point():
        raise ArgumentError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
            f"{attn_mask.dtype} and query.dtype: {query.dtype} instead."
        )
    if not query.dim() == key.dim() == value.dim() == 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return _broadcast_attention(query, key, value, attn_mask, *options)
    return flash_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        causal=is_causal,
        causal_align="top_left",
        scale=scale,
    )


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, bias: Any, *options: Any) -> Tensor:
    """scaled_dot_product_attention with a causal bias."""
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        # Whatever the lengths, as torch.
        dropout_p, _, scale, enable_gqa = options
        return scaled_dot_product_attention(query, key, value, None, dropout_p, True, scale, enable_gqa)
    return scaled_dot_product_attention(query, key, value, as_mask(bias, query), *options)


def _nested_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """scaled_dot_product_attention of nested tensors."""
    if not (query.is_nested and key.is_nested and value.is_nested) or attn_mask is not None:
        raise ArgumentError(
            "query, key and value must all be nested tensors or none, and nested ones take no attn_mask"
        )
    (q, q_lengths), (k, k_lengths), (v, v_lengths) = (
        to_padded(name, t, -2) for name, t in (("query", query), ("key", key), ("value", value))
    )
    if len(q_lengths) != len(k_lengths) or not torch.equal(k_lengths, v_lengths):
        raise ArgumentError(
            "nested query, key and value must have as many sequences, and key and value of the same lengths, got "
            f"{q_lengths.tolist()}, {k_lengths.tolist()} and {v_lengths.tolist()}"
        )
    if q.dim() == 3:
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    output = flash_attention(
        q,
        k,
        v,
        dropout_p=dropout_p,
        causal=is_causal,
        causal_align="top_left",
        scale=scale,
        enable_gqa=enable_gqa,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
    )
    return from_padded(output if query.dim() == 4 else output.squeeze(1), query, q_lengths, -2)


def _broadcast_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """scaled_dot_product_attention of any leading sizes."""
    tensors = {"query": query, "key": key, "value": value}
    for name, t in tensors.items():
        if t.dim() < (3 if enable_gqa else 2):
            raise ArgumentError(f"{name} must have at least {3 if enable_gqa else 2} dimensions, got {list(t.shape)}")
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        heads = query.shape[-3]
        if any(t.shape[-3] == 0 or heads % t.shape[-3] for t in (key, value)):
            raise ArgumentError(
                f"the {heads} heads of query must be a multiple of the {key.shape[-3]} heads of key and of the "
                f"{value.shape[-3]} of value"
            )
        key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
    # Leading sizes are broadcast; with enable_gqa those before the heads.
    kept = 3 if enable_gqa else 2
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-kept] for t in (query, key, value)))
    except RuntimeError:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise ArgumentError(f"the leading sizes must fit each other, got {shapes}") from None
    query, key, value = (t.expand(*lead, *t.shape[-kept:]) for t in (query, key, value))
    lead = query.shape[:-2]

    def four(t: Tensor) -> Tensor:
        return t.flatten(0, -4) if t.dim() > 4 else t[(None,) * (4 - t.dim())]

    if attn_mask is not None and query.dim() > 4:
        try:
            attn_mask = four(attn_mask.expand(*lead, *attn_mask.shape[-2:]))
        except RuntimeError:
            raise ArgumentError(
                f"attn_mask must be broadcastable to {[*lead, key.shape[-2]]}, got {list(attn_mask.shape)}"
            ) from None
    output = flash_attention(
        four(query),
        four(key),
        four(value),
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        causal=is_causal,
        causal_align="top_left",
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return output.reshape(*lead, *output.shape[-2:])


def attention_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights, which takes memory quadratic in the lengths.

    Args:
        query, key, value: [B, H, Lq, D], [B, H, Lk, D] and [B, H, Lk, Dv].
        mask: as in :func:`flash_attention`.
        dropout_p: probability of dropping a weight.

    Returns:
        output [B, H, Lq, Dv] and the weights [B, H, Lq, Lk] it was computed with, dropout included. A query that sees
        no key has weights and output of 0.
    """
    query, key, value = autocast(query, key, value)
    scaled = query / math.sqrt(query.shape[-1])
    scores = scaled @ key.mT if mask is None else hiding_scores(scaled, key)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        mask = mask.to(scores.dtype)
        scores = (scores + mask).masked_fill(mask == -torch.inf, -torch.inf)
    hidden = scores == -torch.inf
    empty = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return hiding_product(weights, value) if mask is not None else weights @ value, weights
