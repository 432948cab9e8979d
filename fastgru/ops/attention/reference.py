"""Computes attention in plain torch, on any device: the oracle, the fallback, and the path of double backward.

With query i of a head and key j of its group:

    x = scale * q_i . k_j                              c = softcap * tanh(x / softcap), or x without softcap
    s = c - slope * |i + offset - j| + bias            -inf where i may not see j
    p = exp(s - m_i) / l_i    m_i = max_j s    l_i = sum_j exp(s - m_i)    o_i = sum_j drop(p) v_j
    lse_i = m_i + log l_i

Backward, with delta_i = sum_j p dp - dlse_i:

    dp = drop(do_i . v_j)    ds = p (dp - delta_i)    dx = ds (1 - (c / softcap)^2)
    dq_i = scale sum_j dx k_j    dk_j = scale sum_i dx q_i    dv_j = sum_i drop(p) do_i    dbias = ds

Query i may see key j when j < k_length, i < q_length, the mask allows it, bias is not -inf and
-window_left <= j - (i + offset) <= window_right, where a negative window has no bound. The offset is
k_length - q_length with ``bottom_right``, else 0. A row that sees no key has o = 0, lse = -inf and no gradient.
Whatever a hidden position holds, NaN included, reaches neither results nor gradients.

Rows are computed a chunk at a time, so memory is linear in the lengths. bfloat16 and float16 are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgru.ops.attention.arguments import Attention, check_lengths, empty_like_layout
from fastgru.ops.numerics import outside_autocast, wide

# Scores held at once.
_CHUNK_ELEMENTS = 1 << 24
_MASK_32 = 0xFFFFFFFF


def _laid_out(like: Tensor, values: Tensor) -> Tensor:
    return empty_like_layout(like, values.size(-1)).copy_(values)


def _mix_32(x: Tensor) -> Tensor:
    """murmur3's finalizer on the low 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK_32
    return x ^ (x >> 16)


def _mix_64(x: Tensor) -> Tensor:
    """splitmix64's finalizer."""

    def shifted(x: Tensor, n: int) -> Tensor:
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shifted(x, 31)


def dropout_keep(a: Attention, start: int, stop: int) -> Tensor:
    """Which scores of rows [start, stop) dropout keeps, bool [B, Hq, rows, Lk]: a hash of seed, row and key."""
    B, H, Lq, _ = a.query.shape
    device = a.query.device
    assert a.dropout_seed is not None
    row = torch.arange(B * H, device=device).view(B, H, 1) * Lq + torch.arange(start, stop, device=device)
    row_key = _mix_64(row * (0x9E3779B97F4A7C15 - (1 << 64)) + a.dropout_seed).unsqueeze(-1)
    low, high = row_key & _MASK_32, (row_key >> 32) & _MASK_32
    column = torch.arange(a.key.size(2), device=device) * 0x9E3779B9
    bits = _mix_32(_mix_32((low + column) & _MASK_32) ^ high)
    return bits >= dropout_threshold(a.dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """A position is dropped when its 32 hashed bits are below this."""
    return min(round(dropout_p * 2**32), _MASK_32)


def _rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor if tensor.size(2) == 1 else tensor[:, :, start:stop]


def _offset(a: Attention) -> Tensor | int:
    """i + offset is the key on the diagonal of query i; [B, 1, 1, 1] where it depends on the sequence."""
    if not a.bottom_right:
        return 0
    k_length = a.key.size(2) if a.k_lengths is None else a.k_lengths.view(-1, 1, 1, 1)
    return k_length - (a.query.size(2) if a.q_lengths is None else a.q_lengths.view(-1, 1, 1, 1))


def _visible(a: Attention, start: int, stop: int) -> Tensor | None:
    """Which keys the rows [start, stop) may see, broadcastable to [B, Hq, rows, Lk]; None for all."""
    device = a.query.device
    i = torch.arange(start, stop, device=device).view(1, 1, -1, 1)
    j = torch.arange(a.key.size(2), device=device).view(1, 1, 1, -1)
    conditions = []
    if a.mask is not None:
        conditions.append(_rows_of(a.mask, start, stop))
    if a.q_lengths is not None:
        conditions.append(i < a.q_lengths.view(-1, 1, 1, 1))
    if a.k_lengths is not None:
        conditions.append(j < a.k_lengths.view(-1, 1, 1, 1))
    if a.window_left >= 0:
        conditions.append(j >= i + _offset(a) - a.window_left)
    if a.window_right >= 0:
        conditions.append(j <= i + _offset(a) + a.window_right)
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return visible


def _product_across(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT


def _heads(a: Attention, tensor: Tensor) -> Tensor:
    """Key heads, wide and repeated for the query heads of their group."""
    return wide(tensor).repeat_interleave(a.group, 1) if a.group > 1 else wide(tensor)


def _scores(
    a: Attention, key: Tensor, start: int, stop: int, product: Callable[[Tensor, Tensor], Tensor] = _product_across
) -> tuple[Tensor, Tensor]:
    """Of rows [start, stop): c and s, as the top of this file calls them."""
    capped = product(wide(a.query[:, :, start:stop]), key) * a.scale
    if a.softcap > 0:
        capped = a.softcap * torch.tanh(capped / a.softcap)
    scores = capped
    if a.alibi_slopes is not None:
        i = torch.arange(start, stop, device=key.device).view(1, 1, -1, 1)
        j = torch.arange(a.key.size(2), device=key.device)
        scores = scores - a.alibi_slopes[:, :, None, None] * (i + _offset(a) - j).abs()
    if a.bias is not None:
        bias = wide(_rows_of(a.bias, start, stop))
        scores = (scores + bias).masked_fill(bias == -torch.inf, -torch.inf)
    visible = _visible(a, start, stop)
    return capped, scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def hiding_scores(query: Tensor, key: Tensor) -> Tensor:
    """query @ key^T, in which NaN and infinity reach the gradients only of what they meet in it."""
    odd_query, odd_key = ~query.isfinite(), ~key.isfinite()
    clean = query.masked_fill(odd_query, 0) @ key.masked_fill(odd_key, 0).mT
    met = odd_query.any(-1).unsqueeze(-1) | odd_key.any(-1).unsqueeze(-2)
    return torch.where(met, (query.detach() @ key.detach().mT), clean)


def hiding_product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x, in which a weight of zero hides what it meets, NaN and infinity too."""
    odd = ~x.isfinite()
    met = (weights.detach() != 0).to(x.dtype) @ odd.to(x.dtype)
    return (weights @ x.masked_fill(odd, 0)).masked_fill(met > 0, torch.nan)


def _product(a: Attention, weights: Tensor, x: Tensor) -> Tensor:
    return hiding_product(weights, x) if a.hides else weights @ x


def softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the row's maximum m and sum l of exponentials, both [.., 1]; a row that is all -inf has weights, m and l
    of 0."""
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total.masked_fill(total == 0, 1), top, total


def log_sum(top: Tensor, total: Tensor) -> Tensor:
    """lse of what :func:`softmax` returns; -inf for a row that is all -inf."""
    empty = total == 0
    return (top + torch.log(total.masked_fill(empty, 1))).masked_fill(empty, -torch.inf)


def _forward_rows(
    a: Attention,
    key: Tensor,
    value: Tensor,
    start: int,
    stop: int,
    product: Callable[[Tensor, Tensor], Tensor] = _product_across,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, m and l of rows [start, stop), wide; differentiable by autograd."""
    _, scores = _scores(a, key, start, stop, product)
    weights, top, total = softmax(scores)
    if a.dropout_seed is not None:
        weights = weights * dropout_keep(a, start, stop) / (1 - a.dropout_p)
    return _product(a, weights, value), top.squeeze(-1), total.squeeze(-1)


def _chunks(a: Attention) -> Iterator[tuple[int, int]]:
    B, H, Lq, _ = a.query.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, B * H * a.key.size(2)))
    return ((start, min(start + step, Lq)) for start in range(0, Lq, step))


@outside_autocast
def attention_differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attention as a composite of torch operators, which autograd can differentiate any number of times.

    Args:
        arguments: those of :class:`Attention`.

    Returns:
        output [B, Hq, Lq, Dv] and lse [B, Hq, Lq].
    """
    a = Attention(*arguments)
    if a.key.size(2) == 0:
        nothing = wide(a.query).sum(-1) * 0
        return nothing.unsqueeze(-1).expand(*nothing.shape, a.value.size(3)).to(a.query.dtype), nothing - torch.inf
    key, value = _heads(a, a.key), _heads(a, a.value)
    if not a.hides:
        output, top, total = _forward_rows(a, key, value, 0, a.query.size(2))
        return output.to(a.query.dtype), log_sum(top, total)
    output, top, total = _forward_rows(a, key, value, 0, a.query.size(2), hiding_scores)
    # What comes back for a row that saw nothing goes no further, NaN neither.
    return output.masked_fill((total == 0).unsqueeze(-1), 0).to(a.query.dtype), log_sum(top, total)


@outside_autocast
def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator. As :func:`attention_differentiable`, in linear memory, and with m and l of every row.

    Raises:
        RuntimeError: lengths out of range.
    """
    a = Attention(*arguments)
    check_lengths("q_lengths", a.q_lengths, a.query.size(2))
    check_lengths("k_lengths", a.k_lengths, a.key.size(2))
    output = empty_like_layout(a.query, a.value.size(3))
    statistics = torch.zeros(2, *a.query.shape[:3], dtype=wide(a.query).dtype, device=a.query.device)
    key, value = _heads(a, a.key), _heads(a, a.value)
    for start, stop in _chunks(a) if a.key.size(2) else ():
        rows, *row_statistics = _forward_rows(a, key, value, start, stop)
        output[:, :, start:stop] = rows
        statistics[:, :, :, start:stop] = torch.stack(row_statistics)
    return output if a.key.size(2) else output.zero_(), log_sum(*statistics), statistics


@outside_autocast
def attention_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; that of a bias that needs none has shape [0].

    Args:
        grad_output, grad_lse: gradients of the forward operator's results, None for zero.
        arguments: those of :class:`Attention`, output and statistics as the forward operator returned them,
            need_bias_grad. Here weights are computed from the scores alone, because all keys of a row are at hand.
    """
    *inputs, output, statistics, need_bias_grad = arguments
    a = Attention(*inputs)
    key, value = _heads(a, a.key), _heads(a, a.value)
    grad_query = torch.zeros_like(wide(a.query))
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    wants_bias = need_bias_grad and a.bias is not None
    grad_bias = torch.zeros(
        a.bias.shape if wants_bias and a.bias is not None else 0, dtype=statistics.dtype, device=statistics.device
    )
    for start, stop in _chunks(a) if a.key.size(2) else ():
        rows = slice(start, stop)
        capped, scores = _scores(a, key, start, stop)
        weights, _, _ = softmax(scores)
        if grad_output is None:
            d_output = torch.zeros_like(output[:, :, rows], dtype=statistics.dtype)
        else:
            d_output = wide(grad_output[:, :, rows])
        dropped, d_weights = weights, d_output @ value.mT
        if a.dropout_seed is not None:
            kept = dropout_keep(a, start, stop) / (1 - a.dropout_p)
            dropped, d_weights = weights * kept, d_weights * kept
        delta = torch.where(weights == 0, 0, weights * d_weights).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, rows].unsqueeze(-1)
        d_scores = torch.where(weights == 0, 0, weights * (d_weights - delta))
        if wants_bias:
            _rows_of(grad_bias, start, stop).add_(d_scores.sum_to_size(_rows_of(grad_bias, start, stop).shape))
        if a.softcap > 0:
            d_scores = torch.where(weights == 0, 0, d_scores * (1 - (capped / a.softcap) ** 2))
        grad_query[:, :, rows] = _product(a, d_scores, key) * a.scale
        grad_key += _product(a, d_scores.mT, wide(a.query[:, :, rows])) * a.scale
        grad_value += _product(a, dropped.mT, d_output)
    grads = [_laid_out(a.query, grad_query)]
    for like, grad in ((a.key, grad_key), (a.value, grad_value)):
        grads.append(_laid_out(like, grad.unflatten(1, (-1, a.group)).sum(2)))
    return grads[0], grads[1], grads[2], grad_bias.to(a.query.dtype)
