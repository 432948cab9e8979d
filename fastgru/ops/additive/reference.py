"""Computes additive attention in plain torch, a piece of the scores at a time.

    s_ij = weight . tanh(q_i + k_j), -inf for j >= k_length    p_ij = exp(s_ij - m_i) / l_i    o_i = sum_j p_ij v_j

Backward, with delta_i = do_i . o_i and t_ij = tanh(q_i + k_j):

    ds = p (do_i . v_j - delta_i)    dz_ij = ds_ij weight (1 - t_ij^2)
    dq_i = sum_j dz_ij    dk_j = sum_i dz_ij    dweight = sum_ij ds_ij t_ij    dv_j = sum_i p_ij do_i

t [B, Lq, Lk, H] never exists as a whole: a piece of it is computed, used and dropped, again in the backward pass, which
needs only o, m_i = max_j s_ij and l_i = sum_j exp(s_ij - m_i). A sequence without keys gives 0 and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgru.ops.attention.arguments import check_lengths
from fastgru.ops.attention.reference import softmax
from fastgru.ops.numerics import outside_autocast, wide

# Elements of t, and of s, held at once.
_PIECE = 1 << 22


def _pieces(count: int, each: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, each))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _hidden(k_lengths: Tensor | None, keys: int) -> Tensor | None:
    """[B, 1, Lk]: which keys are padding."""
    if k_lengths is None:
        return None
    return torch.arange(keys, device=k_lengths.device) >= k_lengths.view(-1, 1, 1)


def _softmax(scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf))


def _shown(value: Tensor, hidden: Tensor | None) -> Tensor:
    """Zeros in the padding: a weight of zero does not hide NaN."""
    return value if hidden is None else value.masked_fill(hidden.mT, 0)


def _scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """[B, rows, Lk]."""
    each = query.size(0) * query.size(1) * query.size(2)
    pieces = [
        torch.tanh(query.unsqueeze(2) + key[:, piece].unsqueeze(1)) @ weight for piece in _pieces(key.size(1), each)
    ]
    return torch.cat(pieces, -1)


@outside_autocast
def additive_differentiable(
    query: Tensor, key: Tensor, weight: Tensor, value: Tensor, k_lengths: Tensor | None
) -> Tensor:
    """Additive attention as a composite of torch operators; t exists as a whole.

    Args:
        query, key: [B, Lq, H] and [B, Lk, H], Lk >= 1.
        weight: [H].
        value: [B, Lk, Dv].
        k_lengths: int64 [B].

    Returns:
        [B, Lq, Dv].
    """
    hidden = _hidden(k_lengths, key.size(1))
    shown = _shown(wide(key), hidden)
    scores = torch.tanh(wide(query).unsqueeze(2) + shown.unsqueeze(1)) @ wide(weight)
    weights, _, _ = _softmax(scores, hidden)
    return (weights @ _shown(wide(value), hidden)).to(query.dtype)


def _row_pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    B, Lq, H = query.shape
    return _pieces(Lq, B * max(key.size(1), H))


@outside_autocast
def additive(
    query: Tensor, key: Tensor, weight: Tensor, value: Tensor, k_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The forward operator: as :func:`additive_differentiable`, in linear memory, and statistics [2, B, Lq]: m and l.

    Raises:
        RuntimeError: lengths out of range.
    """
    check_lengths("k_lengths", k_lengths, key.size(1))
    hidden = _hidden(k_lengths, key.size(1))
    wide_key, wide_value = _shown(wide(key), hidden), _shown(wide(value), hidden)
    output = query.new_empty(*query.shape[:2], value.size(2))
    statistics = torch.empty(2, *query.shape[:2], dtype=wide_key.dtype, device=query.device)
    for rows in _row_pieces(query, key):
        weights, top, total = _softmax(_scores(wide(query[:, rows]), wide_key, wide(weight)), hidden)
        output[:, rows] = (weights @ wide_value).to(query.dtype)
        statistics[0, :, rows], statistics[1, :, rows] = top.squeeze(-1), total.squeeze(-1)
    return output, statistics


@outside_autocast
def additive_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    value: Tensor,
    k_lengths: Tensor | None,
    output: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, weight and value, in linear memory; statistics have none."""
    hidden = _hidden(k_lengths, key.size(1))
    wide_key, wide_value, wide_weight = _shown(wide(key), hidden), _shown(wide(value), hidden), wide(weight)
    top, total = statistics[0].unsqueeze(-1), statistics[1].unsqueeze(-1)
    total = total.masked_fill(total == 0, 1)  # a sequence without keys
    d_query = torch.zeros_like(query, dtype=statistics.dtype)
    d_key, d_value, d_weight = torch.zeros_like(wide_key), torch.zeros_like(wide_value), torch.zeros_like(wide_weight)
    for rows in _row_pieces(query, key):
        q, d_output = wide(query[:, rows]), wide(grad_output[:, rows])
        delta = (d_output * wide(output[:, rows])).sum(-1, keepdim=True)
        for piece in _pieces(key.size(1), q.numel()):
            t = torch.tanh(q.unsqueeze(2) + wide_key[:, piece].unsqueeze(1))
            scores = t @ wide_weight
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, :, piece], -torch.inf)
            weights = torch.exp(scores - top[:, rows]) / total[:, rows]
            d_value[:, piece] += weights.mT @ d_output
            d_scores = torch.where(weights == 0, 0, weights * (d_output @ wide_value[:, piece].mT - delta))
            d_weight += torch.einsum("bij,bijh->h", d_scores, t)
            d_sum = d_scores.unsqueeze(-1) * (1 - t * t) * wide_weight
            d_query[:, rows] += d_sum.sum(2)
            d_key[:, piece] += d_sum.sum(1)
    dtype = query.dtype
    return d_query.to(dtype), d_key.to(dtype), d_weight.to(dtype), d_value.to(dtype)
