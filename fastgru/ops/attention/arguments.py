"""Defines the arguments of attention's operators, and checks those of its functions."""

from __future__ import annotations

import numbers
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgru._torch_private import forward_mode

# A window of so many keys is clipped: sums of it and a position must not overflow, in 32 bits on a GPU.
_FAR = 1 << 30


class ArgumentError(ValueError, RuntimeError):
    """Arguments that do not fit, for those who expect ValueError and those who expect torch's RuntimeError."""


class Attention(NamedTuple):
    """The arguments of the operators, in their order. See :mod:`fastgru.ops.attention.schema`."""

    query: Tensor  # [B, Hq, Lq, D]
    key: Tensor  # [B, Hk, Lk, D]
    value: Tensor  # [B, Hk, Lk, Dv]
    bias: Tensor | None  # every size that of [B, Hq, Lq, Lk], or 1
    mask: Tensor | None  # bool, likewise; True: may be seen
    q_lengths: Tensor | None  # int64 [B]
    k_lengths: Tensor | None  # int64 [B]
    alibi_slopes: Tensor | None  # [B or 1, Hq], of the type computed in
    dropout_seed: Tensor | None  # int64, one number
    dropout_p: float
    scale: float
    softcap: float
    window_left: int
    window_right: int
    bottom_right: bool

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.size(1) // self.key.size(1)

    @property
    def hides(self) -> bool:
        """Some position may be hidden."""
        given = (self.bias, self.mask, self.q_lengths, self.k_lengths)
        return any(t is not None for t in given) or self.window_left >= 0 or self.window_right >= 0


def empty_like_layout(like: Tensor, columns: int) -> Tensor:
    """[B, H, L, columns] laid out as ``like``: heads before positions in memory, or after them."""
    B, H, L, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, L, H, columns).transpose(1, 2)
    return like.new_empty(B, H, L, columns)


def check_lengths(name: str, lengths: Tensor | None, most: int) -> None:
    """Only on the CPU, where reading numbers costs nothing."""
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(t) for t in lengths.aminmax())
        if low < 0 or high > most:
            raise RuntimeError(f"{name} must lie in [0, {most}], got {low if low < 0 else high}")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = query.shape, key.shape, value.shape
    # At once, because a small problem takes no longer than its checks; what is wrong is looked for below.
    if (
        (query.dtype is key.dtype is value.dtype)
        and query.dtype.is_floating_point
        and query.device == key.device == value.device
        and len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and q[3] == k[3]
        and k[1:3] == v[1:3]
        and k[1] > 0
        and q[1] % k[1] == 0
    ):
        return
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ArgumentError(f"{name} must be [B, H, L, D], got {t.dim()} dimensions: {tuple(t.shape)}")
        if t.dtype is not query.dtype or not t.dtype.is_floating_point:
            raise ArgumentError(f"query, key and value must have one floating dtype, got {query.dtype} and {t.dtype}")
        if t.device != query.device:
            raise ArgumentError(f"query, key and value must be on one device, got {query.device} and {t.device}")
    B, H, _, D = query.shape
    if key.shape[0] != B or value.shape[0] != B:
        raise ArgumentError(
            f"query, key and value must have one batch size, got {B}, {key.shape[0]} and {value.shape[0]}"
        )
    if key.shape[3] != D:
        raise ArgumentError(f"query and key must have one head dimension, got {D} and {key.shape[3]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ArgumentError(
            f"key and value must have the same heads and length, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    heads = key.shape[1]
    if heads != H and (heads == 0 or H % heads != 0):
        raise ArgumentError(f"the {H} heads of query must be a multiple of the {heads} heads of key")


def _tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested one" if t.is_nested else f"one of layout {t.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _number(name: str, value: Any) -> float:
    """A number of Python. A tensor's gradient would be lost."""
    if type(value) in (float, int):
        return value  # type: ignore[no-any-return]
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(f"{name} must be a number, got a tensor of shape {list(value.shape)} and {value.dtype}")
        tangent = forward_ad.unpack_dual(value).tangent if forward_mode._current_level >= 0 else None
        if tangent is not None or (value.requires_grad and torch.is_grad_enabled()):
            raise TypeError(f"{name} must be a number, got a tensor that requires a gradient, which is not computed")
    elif not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _window(window: Any, query: Tensor, key: Tensor) -> tuple[int, int]:
    """Keys to the left and to the right, -1 for no bound."""
    sizes = []
    try:
        for size in window:
            whole = None if isinstance(size, bool) else operator.index(size)
            if whole is None or whole < -1:
                raise TypeError
            if whole >= _FAR:
                whole = -1 if whole >= query.shape[2] + key.shape[2] else min(whole, 1 << 62)
            sizes.append(whole)
        left, right = sizes
    except (TypeError, ValueError):
        raise ArgumentError(f"window must be two whole numbers of keys, or -1 for no bound, got {window}") from None
    return left, right


def _broadcastable(name: str, t: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As [B, Hq, Lq, Lk] with sizes of 1 where it is broadcast."""
    _tensor(name, t)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if t.device != query.device:
        raise ArgumentError(f"{name} must be on {query.device}, got {t.device}")
    shape = (1,) * (4 - t.dim()) + tuple(t.shape)
    if len(shape) != 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise ArgumentError(f"{name} must be broadcastable to [B, Hq, Lq, Lk] = {list(full)}, got {list(t.shape)}")
    return t[(None,) * (4 - t.dim())]


def _lengths(name: str, lengths: Tensor | None, query: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    _tensor(name, lengths)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype is torch.bool:
        raise ArgumentError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.shape != query.shape[:1]:
        raise ArgumentError(f"{name} must have shape [B] = [{query.shape[0]}], got {list(lengths.shape)}")
    return lengths.to(query.device, torch.int64)


def is_causal_bias(t: Any) -> bool:
    """Whether ``t`` is a torch.nn.attention.bias.CausalBias. That module is not imported for the question: it takes
    torch's compiler along."""
    return type(t) is not Tensor and any(base.__module__ == "torch.nn.attention.bias" for base in type(t).__mro__)


def as_mask(bias: Any, query: Tensor) -> Tensor:
    """The mask [L, S] that a causal bias stands for, True may be seen. Its own memory holds nothing."""
    offset = bias.seq_len_kv - bias.seq_len_q if bias.variant.name == "LOWER_RIGHT" else 0
    return torch.ones(bias.seq_len_q, bias.seq_len_kv, dtype=torch.bool, device=query.device).tril(offset)
