"""Attention functions: checks, defaults and the call of the operator of the backend that the registry picks."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgru import _lib, _torch_private
from fastgru._torch_private import forward_mode
from fastgru.backends import gluon, registry
from fastgru.backends.reference_attention import Attention, attention_differentiable, hiding_product, hiding_scores
from fastgru.ops.attention_schema import (
    ATTENTION_OPS,
    TENSORS,
    AttentionFunction,
    AttentionOps,
    plain_attention_with_gradients,
    plain_forward,
)

_warned: set[str] = set()
# Tensors that no one has given a meaning of their own.
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_direct = _lib.direct


def _choose(arguments: tuple[Any, ...]) -> AttentionOps:
    """The operators to call: those of a backend, or under ``auto`` of two, one for each direction."""
    ops = _choose_backend(arguments[0])
    if arguments[0].is_cuda and registry.requested() == registry.AUTO and not torch.compiler.is_compiling():
        forward, backward = gluon.faster(Attention(*arguments))
        ops = AttentionOps(
            ATTENTION_OPS["gluon"].forward if forward else ops.forward,
            ATTENTION_OPS["gluon"].backward if backward else ops.backward,
        )
    return ops


def _choose_backend(query: Tensor) -> AttentionOps:
    """A backend without attention, asked for by name, raises; ``auto`` goes on to the next that has it, and says so
    once if no kernels are left."""
    name = registry.select(query.device, query.dtype).name
    auto = registry.requested() == registry.AUTO
    if name in ATTENTION_OPS:
        return ATTENTION_OPS[name]
    message = f"backend {name!r} has no attention; backends that have it: {', '.join(ATTENTION_OPS)}"
    if not auto:
        raise registry.BackendUnavailable(message)
    able = (
        b.name
        for b in registry.backends()
        if b.name in ATTENTION_OPS and not b.attention_only and b.why_not(query.device.type, query.dtype) is None
    )
    successor = next(able)
    if successor == "reference" and message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(f"{message}; 'reference' runs instead", RuntimeWarning, stacklevel=4)
    return ATTENTION_OPS[successor]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = query.shape, key.shape, value.shape
    # At once, because a small problem takes no longer than its checks; what is wrong is looked for below.
    if (
        (query.dtype is key.dtype is value.dtype)
        and query.dtype.is_floating_point
        and query.device == key.device == value.device
        and len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and q[3] == k[3] > 0
        and k[1:3] == v[1:3]
        and k[1] > 0
        and q[1] % k[1] == 0
    ):
        return
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, H, L, D], got {t.dim()} dimensions: {tuple(t.shape)}")
        if t.dtype is not query.dtype or not t.dtype.is_floating_point:
            raise ValueError(f"query, key and value must have one floating dtype, got {query.dtype} and {t.dtype}")
        if t.device != query.device:
            raise ValueError(f"query, key and value must be on one device, got {query.device} and {t.device}")
    B, H, _, D = query.shape
    if key.shape[0] != B or value.shape[0] != B:
        raise ValueError(f"query, key and value must have one batch size, got {B}, {key.shape[0]} and {value.shape[0]}")
    if key.shape[3] != D or D == 0:
        raise ValueError(f"query and key must have one head dimension of at least 1, got {D} and {key.shape[3]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"key and value must have the same heads and length, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    heads = key.shape[1]
    if heads == 0 or H % heads != 0:
        raise ValueError(f"the {H} heads of query must be a multiple of the {heads} heads of key")


def _tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def _broadcastable(name: str, t: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As [B, Hq, Lq, Lk] with sizes of 1 where it is broadcast."""
    _tensor(name, t)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if t.device != query.device:
        raise ValueError(f"{name} must be on {query.device}, got {t.device}")
    shape = (1,) * (4 - t.dim()) + tuple(t.shape)
    if len(shape) != 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise ValueError(f"{name} must be broadcastable to [B, Hq, Lq, Lk] = {list(full)}, got {list(t.shape)}")
    return t[(None,) * (4 - t.dim())]


def _lengths(name: str, lengths: Tensor | None, query: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    _tensor(name, lengths)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype is torch.bool:
        raise ValueError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"{name} must have shape [B] = [{query.shape[0]}], got {list(lengths.shape)}")
    return lengths.to(query.device, torch.int64)


def _run(ops: AttentionOps, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or _torch_private.is_tracing():
        result: tuple[Tensor, Tensor] = ops.forward(*arguments)
        return result
    if torch.is_grad_enabled():
        q, k, v, bias = arguments[:4]
        if q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad):
            return AttentionFunction.apply(ops, arguments[TENSORS:], *arguments[:TENSORS])  # type: ignore[no-any-return, no-untyped-call]
    # No gradient to record: below autograd, whose way through Python is longer than a small problem.
    with _torch_private.below_autograd():
        return ops.forward(*arguments)  # type: ignore[no-any-return]


def _at_once(
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
    one, which the long way has the words for."""
    if _is_compiling():
        return None
    options = scale, causal, bottom_right, grouped
    if _direct is not None and type(query) in _PLAIN and forward_mode._current_level < 0:
        backend = registry.selected("cpu", query.dtype)
        if backend is not None and backend.name == "cpu":
            output = _direct.attention(query, key, value, mask, *options)
            if output is True:
                return plain_attention_with_gradients(query, key, value, mask, options)
            if output is not None:
                return output  # type: ignore[no-any-return]
    if (
        not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        or not (query.is_cpu and query.dim() == 4)
        or not (mask is None or (type(mask) is Tensor and mask.dtype is torch.bool))
        or _torch_private.is_any_autocast_enabled()
        or _torch_private.is_tracing()
        or _torch_private.are_functorch_transforms_active()
        or forward_mode._current_level >= 0
    ):
        return None
    try:
        if registry.select("cpu", query.dtype).name != "cpu":
            return None
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return plain_attention_with_gradients(query, key, value, mask, options)
        return plain_forward(query, key, value, mask, *options)[0]  # type: ignore[no-any-return]
    except RuntimeError:
        return None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not _torch_private.is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


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
            -inf hides, as False does.
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
        TypeError: something that is not a tensor in the place of one.
        RuntimeError: lengths out of range (on the CPU; on a GPU they are clamped).
        BackendUnavailable: the backend asked for cannot run this.
    """
    if (
        bias is None
        and dropout_p == 0
        and causal_align in ("bottom_right", "top_left")
        and window == (-1, -1)
        and softcap == 0
        and alibi_slopes is None
        and q_lengths is None
        and k_lengths is None
        and not return_lse
    ):
        output = _at_once(query, key, value, attn_mask, scale, causal, causal_align == "bottom_right", enable_gqa)
        if output is not None:
            return output
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, t in (("query", query), ("key", key), ("value", value)):
            _tensor(name, t)
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value)
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}: pass enable_gqa=True to share key heads"
        )
    if causal_align not in ("bottom_right", "top_left"):
        raise ValueError(f"causal_align must be 'bottom_right' or 'top_left', got {causal_align!r}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if softcap < 0:
        raise ValueError(f"softcap must not be negative, got {softcap}")
    if len(window) != 2 or any(isinstance(w, float) or w is None or w < -1 for w in window):
        raise ValueError(f"window must be two whole numbers of keys, or -1 for no bound, got {tuple(window)}")
    left, right = window
    if causal:
        right = 0
    mask = None
    if attn_mask is not None:
        attn_mask = _broadcastable("attn_mask", attn_mask, query, key)
        if attn_mask.dtype is torch.bool:
            mask = attn_mask
        elif not attn_mask.dtype.is_floating_point:
            raise ValueError(f"attn_mask must be bool or floating, got {attn_mask.dtype}")
    if bias is not None:
        bias = _broadcastable("bias", bias, query, key)
        if not bias.dtype.is_floating_point:
            raise ValueError(f"bias must be floating, got {bias.dtype}")
    if attn_mask is not None and mask is None:
        bias = attn_mask if bias is None else attn_mask + bias
    if bias is not None:
        bias = bias.to(query.dtype)
    if alibi_slopes is not None:
        _tensor("alibi_slopes", alibi_slopes)
        if alibi_slopes.shape not in ((query.shape[1],), (query.shape[0], query.shape[1])):
            raise ValueError(
                f"alibi_slopes must be [Hq] = [{query.shape[1]}] or [B, Hq], got {list(alibi_slopes.shape)}"
            )
        wide = torch.float64 if query.dtype is torch.float64 else torch.float32
        alibi_slopes = alibi_slopes.detach().to(query.device, wide).view(-1, query.shape[1])
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
    if _torch_private.are_functorch_transforms_active() or forward_mode._current_level >= 0:
        output, lse = attention_differentiable(*arguments)
    else:
        output, lse = _run(_choose(arguments), arguments)
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
        key, value: [..., S, E] and [..., S, Ev]. Leading sizes are broadcast, heads only without ``enable_gqa``.
        attn_mask: broadcastable to [..., L, S]: bool, True may be seen, or floating, added to the scores.
        is_causal: a query sees the keys up to its own index (the diagonal starts at the top left).

    Returns:
        [..., L, Ev].

    Raises:
        RuntimeError: both attn_mask and is_causal.
        ValueError: as :func:`flash_attention`.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError("scaled_dot_product_attention: attn_mask and is_causal must not both be set")
    if dropout_p == 0:
        output = _at_once(query, key, value, attn_mask, scale, is_causal, False, enable_gqa)
        if output is not None:
            return output
    if not query.dim() == key.dim() == value.dim() == 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return _broadcast_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
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
            raise ValueError(f"{name} must have at least {3 if enable_gqa else 2} dimensions, got {list(t.shape)}")
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        heads = query.shape[-3]
        if any(t.shape[-3] == 0 or heads % t.shape[-3] for t in (key, value)):
            raise ValueError(
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
        raise ValueError(f"the leading sizes must fit each other, got {shapes}") from None
    query, key, value = (t.expand(*lead, *t.shape[-kept:]) for t in (query, key, value))
    lead = query.shape[:-2]

    def four(t: Tensor) -> Tensor:
        return t.flatten(0, -4) if t.dim() > 4 else t[(None,) * (4 - t.dim())]

    if attn_mask is not None and query.dim() > 4:
        attn_mask = four(attn_mask.expand(*lead, *attn_mask.shape[-2:]))
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
    query, key, value = _autocast(query, key, value)
    scaled = query / math.sqrt(query.shape[-1])
    scores = scaled @ key.mT if mask is None else hiding_scores(scaled, key)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = (scores + mask).masked_fill(mask == -torch.inf, -torch.inf)
    hidden = scores == -torch.inf
    empty = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return hiding_product(weights, value) if mask is not None else weights @ value, weights
