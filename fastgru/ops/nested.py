"""Converts nested tensors, of either layout, to padded ones and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_padded(name: str, nested: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A nested tensor whose sizes differ in ``dim``, counted from the end, with zeros in the padding.

    Returns:
        [B, ..., longest, ...] and the lengths, int64 [B].

    Raises:
        ValueError: other sizes differ too, or there are no sequences.
    """
    parts: list[Tensor] = list(nested.unbind())
    others = {(*part.shape[:dim], *part.shape[part.dim() + dim + 1 :]) for part in parts}
    if len(others) != 1:
        raise ValueError(
            f"{name} must be a nested tensor of sequences that differ in length only, got {others or 'none'}"
        )
    lengths = [part.size(dim) for part in parts]
    padding = [0, 0] * (-dim - 1)
    padded = [torch.nn.functional.pad(part, [*padding, 0, max(lengths) - part.size(dim)]) for part in parts]
    return torch.stack(padded), torch.tensor(lengths, device=padded[0].device)


def from_padded(padded: Tensor, like: Tensor, lengths: Tensor, dim: int) -> Tensor:
    """The nested tensor of the layout and the lengths of ``like`` that :func:`to_padded` took apart."""
    parts = [part.narrow(dim, 0, length) for part, length in zip(padded.unbind(), lengths.tolist(), strict=True)]
    if like.layout is not torch.jagged:
        return torch.nested.as_nested_tensor(parts)
    jagged: Any = like
    if jagged.lengths() is not None:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    # On the offsets of ``like``: torch adds jagged tensors only where these are one object.
    rows = torch.cat([part.movedim(dim, 0) for part in parts])
    nested = torch.nested.nested_tensor_from_jagged(rows, jagged.offsets())
    return nested.movedim(1, dim) if padded.dim() == 4 else nested
