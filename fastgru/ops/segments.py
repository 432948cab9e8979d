"""Sequences of any lengths and with resets, as one batch of packed segments.

A reset cuts a row of the batch in two: no state crosses it, in either direction. A row of length L with resets is then
a few shorter sequences, its *segments*, and a padded or jagged batch is a batch of segments without padding. Laid out
like a PackedSequence (step by step, the longest first) it runs on every backend, with every derivative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """S segments of a batch of B rows, the longest first. All tensors but ``batch_sizes`` are on the input's device.

    Args:
        positions: int64 [N], where each row of the packed input lies in the flat input.
        batch_sizes: int64 [longest segment], on the CPU, as in a PackedSequence.
        row: int64 [S], the row of the batch that a segment is of.
        keeps_hx: bool [2, S], the segments that start from ``hx``, in the forward and the reverse direction.
        rows: int64 [R], the rows that have a segment at all.
        final: int64 [2, R], the segments that give ``h_n`` of these, in the forward and the reverse direction.
    """

    positions: Tensor
    batch_sizes: Tensor
    row: Tensor
    keeps_hx: Tensor
    rows: Tensor
    final: Tensor


def segments(lengths: Tensor, starts: Tensor, stride: int, reset_mask: Tensor | None, device: torch.device) -> Segments:
    """Cuts a batch.

    Args:
        lengths: int64 [B] on the CPU; rows of length zero have no segment.
        starts: int64 [B] on the CPU, where the first step of each row lies in the flat input.
        stride: from one step of a row to the next in the flat input.
        reset_mask: bool [T, B] on the CPU, True where the state is zeroed before the step; None for no resets.
        device: the input's.
    """
    if reset_mask is None:
        row = lengths.nonzero().squeeze(1)
        step = torch.zeros_like(row)
        zeroed = torch.zeros_like(row, dtype=torch.bool)
    else:
        cuts = reset_mask.t().clone()
        cuts[:, :1] = True
        row, step = (cuts & (torch.arange(cuts.size(1), device="cpu") < lengths[:, None])).nonzero(as_tuple=True)
        zeroed = reset_mask[step, row]
    # In the order of rows, then of steps.
    opens = step == 0
    closes = opens.roll(-1)
    ends = torch.where(closes, lengths[row], step.roll(-1))
    sizes, order = (ends - step).sort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device="cpu")

    # counts[t] segments have more than t steps.
    longest = int(sizes[0]) if sizes.numel() else 0
    batch_sizes = torch.bincount(sizes, minlength=longest + 1)[1:].flip(0).cumsum(0).flip(0)
    packed_step = torch.arange(longest, device="cpu").repeat_interleave(batch_sizes)
    packed_slot = torch.arange(packed_step.numel(), device="cpu") - (batch_sizes.cumsum(0) - batch_sizes)[packed_step]
    first = (starts[row] + step * stride)[order]
    positions = first[packed_slot] + packed_step * stride
    return Segments(
        positions.to(device),
        batch_sizes,
        row[order].to(device),
        torch.stack([opens & ~zeroed, closes])[:, order].to(device),
        row[opens].to(device),
        torch.stack([place[closes], place[opens]]).to(device),
    )


def segment_states(hx: Tensor, parts: Segments, directions: int) -> Tensor:
    """The initial states of all segments [num_layers * D, S, H] from those of the batch [num_layers * D, B, H]."""
    own = hx.index_select(1, parts.row)
    keeps = parts.keeps_hx[:directions].repeat(hx.size(0) // directions, 1)
    # Not a product: what is reset may be infinite.
    return torch.where(keeps.unsqueeze(2), own, torch.zeros_like(own))


def batch_states(h_n: Tensor, hx: Tensor, parts: Segments, directions: int) -> Tensor:
    """The final states of the batch [num_layers * D, B, H] from those of all segments [num_layers * D, S, H].

    Rows without a step keep ``hx`` [num_layers * D, B, H].
    """
    final = parts.final[:directions].repeat(h_n.size(0) // directions, 1)
    states = h_n.gather(1, final.unsqueeze(2).expand(-1, -1, h_n.size(2)))
    if parts.rows.numel() == hx.size(1):
        return states
    return hx.to(h_n.dtype).index_copy(1, parts.rows, states)
