"""The functions of flash-attn 2, under their names, signatures and layouts, on every device and dtype of this package.

Heads come after positions: [B, L, H, D], or [total, H, D] with cumulative lengths. Causal masks, windows and ALiBi have
their diagonal at the bottom right. Masks, biases and lengths: see :func:`fastgru.flash_attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgru.ops import flash_attention
from fastgru.ops.attention.arguments import _tensor

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Any  # Tensor, or (Tensor, lse, None) with return_attn_probs


def _signature(*replaced: str) -> Callable[[Any], Any]:
    """Gives a function the signature of the one it calls, less what its own arguments stand for."""

    def decorate(function: Any) -> Any:
        base = flash_attn_varlen_func if "varlen" in function.__name__ else flash_attn_func
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        left_out = {*replaced, "block_table", *(p.name for p in own)}
        rest = [p for p in inspect.signature(base).parameters.values() if p.name not in left_out]
        function.__signature__ = inspect.Signature([*own, *rest], return_annotation=Result)
        return function

    return decorate


def _run(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool, **options: Any) -> Result:
    """[B, L, H, D] in and out."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _tensor(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, L, H, D], got {list(t.shape)}")
    output, lse = flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True, return_lse=True, **options
    )
    output = output.transpose(1, 2)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q [B, Lq, Hq, D] over k [B, Lk, Hk, D] and v [B, Lk, Hk, Dv], Hq a multiple of Hk.

    Returns:
        [B, Lq, Hq, Dv]; with return_attn_probs also lse [B, Hq, Lq], and None for the weights, which never exist.

    Raises:
        ValueError: as :func:`fastgru.flash_attention`.
    """
    return _run(
        q,
        k,
        v,
        return_attn_probs,
        dropout_p=dropout_p,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )


@_signature("k", "v")
def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """:func:`flash_attn_func` of kv [B, Lk, 2, Hk, D]."""
    _check_packed("kv", kv, 5, 2)
    k, v = kv.unbind(-3)
    return flash_attn_func(q, k, v, *args, **kwargs)


@_signature("q", "k", "v")
def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """:func:`flash_attn_func` of qkv [B, L, 3, H, D]."""
    _check_packed("qkv", qkv, 5, 3)
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of sequences laid end to end. Padded to max_seqlen for the computation.

    Args:
        q: [total_q, Hq, D].
        k, v: [total_k, Hk, D] and [total_k, Hk, Dv]; with block_table pages [pages, page_size, Hk, D].
        cu_seqlens_q, cu_seqlens_k: [B + 1] integers: sequence b is the rows [cu[b], cu[b + 1]).
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: [B, pages of a sequence] integers: which pages hold a sequence's keys and values.

    Returns:
        [total_q, Hq, Dv]; with return_attn_probs also lse [Hq, total_q], and None.

    Raises:
        ValueError: as :func:`fastgru.flash_attention`; cumulative lengths that do not fit.
    """
    for name, t in (("q", q), ("k", k), ("v", v), ("block_table", block_table)):
        if t is not None or name != "block_table":
            _tensor(name, t)
    if q.dim() != 3:
        raise ValueError(f"q must be [total_q, Hq, D], got {list(q.shape)}")
    q_lengths = _sequence_lengths("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    k_lengths = _sequence_lengths(
        "cu_seqlens_k", cu_seqlens_k, k.shape[0] if block_table is None else None, max_seqlen_k
    )
    if q_lengths.shape != k_lengths.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must have the same rows and heads, got {list(k.shape)} and {list(v.shape)}")
    if block_table is not None:
        block_table = _used_pages(block_table, k, k_lengths)
    where = _positions(cu_seqlens_q, q.shape[0])
    if block_table is not None:
        padded_k, padded_v = (_gather_pages(t, block_table)[:, :max_seqlen_k] for t in (k, v))
    else:
        padded_k, padded_v = (_pad(t, cu_seqlens_k, max_seqlen_k) for t in (k, v))
    output, lse, _ = _run(
        _pad(q, cu_seqlens_q, max_seqlen_q),
        padded_k,
        padded_v,
        True,
        dropout_p=dropout_p,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
    )
    output = output[where]
    return (output, lse.transpose(1, 2)[where].t(), None) if return_attn_probs else output


@_signature("k", "v")
def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """:func:`flash_attn_varlen_func` of kv [total_k, 2, Hk, D]."""
    _check_packed("kv", kv, 4, 2)
    k, v = kv.unbind(-3)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


@_signature("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Result:
    """:func:`flash_attn_varlen_func` of qkv [total, 3, H, D], whose queries and keys share their lengths."""
    _check_packed("qkv", qkv, 4, 3)
    q, k, v = qkv.unbind(-3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention over a cache of keys and values, after adding new ones to it in place. Without gradients.

    Args:
        q: [B, Lq, Hq, D].
        k_cache, v_cache: [cache rows, S, Hk, D]; with block_table pages [pages, page_size, Hk, D].
        k, v: [B, Lnew, Hk, D], written to the cache from cache_seqlens on.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], applied to k at its positions, and to q: at the positions
            from cache_seqlens on with causal or a window, else all at cache_seqlens.
        cache_seqlens: [B] integers or one number: how much of the cache is filled, the new keys not counted.
        cache_batch_idx: [B] integers: the cache row of each sequence. Not with block_table.
        cache_leftpad: [B] integers: where in the cache row a sequence begins. Not with block_table.
        block_table: [B, pages of a sequence] integers.
        rotary_interleaved: rotate neighbours (0, 1), (2, 3), ... instead of halves.
        num_splits: accepted; the result does not depend on how the work is split.

    Returns:
        [B, Lq, Hq, D]; with return_softmax_lse also lse [B, Hq, Lq].

    Raises:
        ValueError: as :func:`fastgru.flash_attention`; arguments that exclude or need each other.
    """
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise ValueError("block_table excludes cache_batch_idx and cache_leftpad")
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if t is not None or name not in ("k", "v"):
            _tensor(name, t)
        if t is not None and t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {list(t.shape)}")
    for name, t in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin), ("block_table", block_table)):
        if t is not None:
            _tensor(name, t)
    if k is not None and v is not None:
        for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
            shape = (q.shape[0], k.shape[1], *cache.shape[2:])
            if t.shape != shape or t.dtype is not cache.dtype:
                raise ValueError(
                    f"{name} must be {list(shape)} of the cache's {cache.dtype}, got {list(t.shape)} of {t.dtype}"
                )
        if cache_seqlens is None:
            raise ValueError("k and v are written to the cache from cache_seqlens on, which is missing")
    if (
        rotary_cos is not None
        and rotary_sin is not None
        and (rotary_cos.dim() != 2 or rotary_cos.shape != rotary_sin.shape or 2 * rotary_cos.shape[1] > q.shape[3])
    ):
        raise ValueError(
            f"rotary_cos and rotary_sin must be [positions, at most {q.shape[3]} / 2], got "
            f"{list(rotary_cos.shape)} and {list(rotary_sin.shape)}"
        )
    batch, device = q.shape[0], q.device
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[-1])
    added = 0 if k is None else k.shape[1]
    filled = capacity if cache_seqlens is None else cache_seqlens
    if not isinstance(filled, Tensor):
        filled = torch.full((batch,), filled, device=device)
    _check_range("cache_seqlens", filled, batch, capacity - added, f" (a cache of {capacity}, {added} new keys)")
    if rotary_cos is not None:
        positions_of_rotary, needed = rotary_cos.shape[0], max(added, q.shape[1] if causal else 1)
        why = f" (rotary_cos has {positions_of_rotary} positions, {needed} are added)"
        _check_range("cache_seqlens", filled, batch, positions_of_rotary - needed, why)
    if block_table is not None:
        block_table = _used_pages(block_table, k_cache, filled + added)
    if cache_batch_idx is not None:
        _check_range("cache_batch_idx", cache_batch_idx, batch, k_cache.shape[0] - 1)
    if cache_leftpad is not None:
        _check_range("cache_leftpad", cache_leftpad, batch, capacity)
    with torch.no_grad():
        start = filled.to(torch.int64)
        if k is not None and v is not None:
            positions = start[:, None] + torch.arange(k.shape[1], device=device)
            if rotary_cos is not None and rotary_sin is not None:
                k = _rotate(k, rotary_cos, rotary_sin, positions, rotary_interleaved)
            if block_table is not None:
                size = k_cache.shape[1]
                page = block_table.long().gather(1, positions // size)
                k_cache[page, positions % size] = k
                v_cache[page, positions % size] = v
            else:
                row = torch.arange(batch, device=device) if cache_batch_idx is None else cache_batch_idx.long()
                k_cache[row[:, None], positions] = k
                v_cache[row[:, None], positions] = v
            filled = start + k.shape[1]
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(q.shape[1], device=device)
            moving = causal or tuple(window_size) != (-1, -1)
            positions = start[:, None] + (steps if moving else torch.zeros_like(steps))
            q = _rotate(q, rotary_cos, rotary_sin, positions, rotary_interleaved)
        if block_table is not None:
            keys, values = (_gather_pages(cache, block_table) for cache in (k_cache, v_cache))
        elif cache_batch_idx is not None:
            keys, values = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
        else:
            keys, values = k_cache, v_cache
        if cache_leftpad is not None:
            shifted = torch.arange(capacity, device=device) + cache_leftpad.long()[:, None]
            index = shifted.clamp(max=capacity - 1)[:, :, None, None]
            keys, values = (t.gather(1, index.expand(-1, -1, *t.shape[2:])) for t in (keys, values))
            filled = filled - cache_leftpad
        output, lse, _ = _run(
            q,
            keys,
            values,
            True,
            scale=softmax_scale,
            causal=causal,
            window=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            k_lengths=filled,
        )
    return (output, lse) if return_softmax_lse else output


def _check_range(name: str, numbers: Tensor, batch: int, most: int, why: str = "") -> None:
    """[B] integers in [0, most]; their values on the CPU only, where reading them costs nothing."""
    _tensor(name, numbers)
    if numbers.shape != (batch,) or numbers.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be [B] = [{batch}] integers, got {list(numbers.shape)} of {numbers.dtype}")
    _check_values(name, numbers, most, why)


def _check_values(name: str, numbers: Tensor, most: int, why: str = "") -> None:
    if numbers.device.type == "cpu" and numbers.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in numbers.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name} must lie in [0, {most}]{why}, got {low if low < 0 else high}")


def _used_pages(block_table: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
    """The checked table, with some page in the place of those beyond the lengths, which may be anything."""
    batch = lengths.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"block_table must be [B, pages of a sequence] integers with B = {batch}, "
            f"got {list(block_table.shape)} of {block_table.dtype}"
        )
    first = torch.arange(block_table.shape[1], device=block_table.device) * pages.shape[1]
    if block_table.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values("block_table", block_table[first < lengths.unsqueeze(-1)], pages.shape[0] - 1)
    return block_table.clamp(0, pages.shape[0] - 1)


def _check_packed(name: str, t: Tensor, dimensions: int, count: int) -> None:
    _tensor(name, t)
    if t.dim() != dimensions or t.shape[-3] != count:
        raise ValueError(
            f"{name} must have {dimensions} dimensions, the third last of size {count}, got {list(t.shape)}"
        )


def _sequence_lengths(name: str, cu_seqlens: Tensor, total: int | None, longest: int) -> Tensor:
    _tensor(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be [B + 1] of int32, got {list(cu_seqlens.shape)} of {cu_seqlens.dtype}")
    lengths = cu_seqlens.diff()
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if ends[0] != 0 or (total is not None and ends[1] != total):
            raise ValueError(f"{name} must begin with 0 and end with the total of {total} rows, got {ends}")
        low, high = (int(t) for t in lengths.aminmax())
        if low < 0 or high > longest:
            raise ValueError(f"{name} must not decrease, nor hold sequences longer than max_seqlen = {longest}")
    return lengths


def _positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of every row."""
    row = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return sequence, row - cu_seqlens[sequence]


def _pad(t: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """[total, H, D] as [B, longest, H, D], zero in the padding."""
    if t.dim() != 3:
        raise ValueError(f"q, k and v must be [total, H, D], got {list(t.shape)}")
    padded = t.new_zeros(cu_seqlens.shape[0] - 1, longest, *t.shape[1:])
    return padded.index_put(_positions(cu_seqlens, t.shape[0]), t)


def _gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """[pages, page_size, H, D] as [B, capacity, H, D]."""
    return pages[block_table.long()].flatten(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first dimensions of x [B, L, H, D] at ``positions`` [B, L]."""
    half = cos.shape[1]
    cos, sin = (t[positions].unsqueeze(2).float() for t in (cos, sin))
    rotated, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    one, two = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
    turned = (one * cos - two * sin, one * sin + two * cos)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([joined.to(x.dtype), rest], -1)
