"""Cuts sequences of any lengths, and with resets, into one batch of packed segments.

A reset cuts a row of the batch in two: no state crosses it, in either direction. A row of length L with resets is then
a few shorter sequences, its *segments*, and a padded or jagged batch is a batch of segments without padding. Laid out
like a PackedSequence (step by step, the longest first) it runs on every backend, with every derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgru import _torch_private
from fastgru.ops.gru.onnx import WHOLE_BATCHES_ONLY
from fastgru.ops.library import LIBRARY


class Segments(NamedTuple):
    """S segments of a batch of B rows, the longest first. All tensors but ``batch_sizes`` are on the input's device.

    Args:
        positions: int64 [N], where each row of the packed input lies in the flat input.
        batch_sizes: int64 [longest segment], on the CPU, as in a PackedSequence.
        row: int64 [S], the row of the batch that a segment is of.
        keeps_hx: bool [2, S], the segments that start from ``hx``, in the forward and the reverse direction.
        rows: int64 [R], the rows that have a segment at all.
        final: int64 [2, R], the segments that give ``h_n`` of these, in the forward and the reverse direction.
        recorded: an operator made these, for a graph that serves other data too. It makes one segment at least: where
            there is none, one of a row behind the flat input's and a state behind the batch's, of a row B.
    """

    positions: Tensor
    batch_sizes: Tensor
    row: Tensor
    keeps_hx: Tensor
    rows: Tensor
    final: Tensor
    recorded: bool = False


def _is_recorded() -> bool:
    """Whether what runs is written down for other data, or might be: a mode sees all operators."""
    return torch.compiler.is_compiling() or _torch_private.is_tracing() or _torch_private.len_torch_dispatch_stack() > 0


def _as_tensor(lengths: Tensor | Sequence[int]) -> Tensor:
    try:
        if not isinstance(lengths, Tensor) and any(isinstance(length, Tensor) for length in lengths):
            # What torch.jit.trace knows of is to stay that.
            return torch.stack([torch.as_tensor(length, device="cpu") for length in lengths])
        return torch.as_tensor(lengths, device=None if isinstance(lengths, Tensor) else "cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths has to be a tensor or a sequence of integers, got {lengths!r}") from error


def _check_lengths(lengths: Tensor, batch: int) -> None:
    """All but the values."""
    # An empty list is of no type.
    of_no_integers = lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool
    if of_no_integers and lengths.numel():
        raise TypeError(f"lengths has to be of an integer type, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has to be of shape [B] = [{batch}], got {list(lengths.shape)}")


def _checked_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """As int64 [B] on the CPU."""
    tensor = _as_tensor(lengths)
    _check_lengths(tensor, batch)
    tensor = tensor.to("cpu", torch.int64)
    wrong = ((tensor < 0) | (tensor > steps)).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(f"lengths has to be between 0 and the {steps} steps of input, got {int(tensor[row])} at {row}")
    return tensor


def _check_type_of_reset_mask(mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"reset_mask has to be a tensor of torch.bool, got {got}")


def _check_reset_mask(mask: Tensor, steps: int, batch: int, batch_first: bool) -> None:
    _check_type_of_reset_mask(mask)
    shape, names = ((batch, steps), "[B, T]") if batch_first else ((steps, batch), "[T, B]")
    if mask.shape != shape:
        raise ValueError(f"reset_mask has to be of shape {names} = {list(shape)}, got {list(mask.shape)}")


def _segments(
    lengths: Tensor, starts: Tensor, stride: int, reset_mask: Tensor | None, device: torch.device
) -> Segments:
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


def _cut(
    input: Tensor,
    lengths: Tensor | Sequence[int] | None,
    offsets: Tensor | None,
    reset_mask: Tensor | None,
    batch_first: bool,
) -> Segments:
    if offsets is not None:
        offsets = offsets.to("cpu", torch.int64)
        sizes = offsets.diff() if lengths is None else _as_tensor(lengths).to("cpu", torch.int64)
        return _segments(sizes, offsets[:-1], 1, None, input.device)
    T, B, _ = input.shape
    sizes = torch.full((B,), T, device="cpu") if lengths is None else _checked_lengths(lengths, T, B)
    if reset_mask is not None:
        _check_reset_mask(reset_mask, T, B, batch_first)
        reset_mask = (reset_mask.t() if batch_first else reset_mask).cpu()
    return _segments(sizes, torch.arange(B, device="cpu"), B, reset_mask, input.device)


LIBRARY.define(
    "gru_segments(Tensor input, Tensor? lengths, Tensor? offsets, Tensor? reset_mask, bool batch_first) -> "
    "(Tensor positions, Tensor batch_sizes, Tensor row, Tensor keeps_hx, Tensor rows, Tensor final)",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fastgru.gru_segments.default


def _kernel(
    input: Tensor, lengths: Tensor | None, offsets: Tensor | None, reset_mask: Tensor | None, batch_first: bool
) -> tuple[Tensor, ...]:
    parts = _cut(input, lengths, offsets, reset_mask, batch_first)
    if parts.row.numel():
        return parts[:6]
    batch, rows = (
        (input.size(1), input.size(0) * input.size(1)) if offsets is None else (offsets.size(0) - 1, input.size(0))
    )
    one = torch.ones(1, dtype=torch.int64, device=input.device)
    from_zero = torch.zeros(2, 1, dtype=torch.bool, device=input.device)
    return one * rows, one.cpu(), one * batch, from_zero, parts.rows, parts.final


def _fake(
    input: Tensor, lengths: Tensor | None, offsets: Tensor | None, reset_mask: Tensor | None, batch_first: bool
) -> tuple[Tensor, ...]:
    if torch.onnx.is_in_onnx_export():
        # Dynamo sees only here that there is an export.
        raise RuntimeError(WHOLE_BATCHES_ONLY)
    if offsets is None:
        T, B, _ = input.shape
        if lengths is not None:
            _check_lengths(lengths, B)
        if reset_mask is not None:
            _check_reset_mask(reset_mask, T, B, batch_first)
    new = torch.library.get_ctx().new_dynamic_size
    positions, steps, segments, rows = new(min=1), new(min=1), new(min=1), new(min=0)
    long, device = torch.int64, input.device
    return (
        torch.empty(positions, dtype=long, device=device),
        torch.empty(steps, dtype=long, device="cpu"),
        torch.empty(segments, dtype=long, device=device),
        torch.empty((2, segments), dtype=torch.bool, device=device),
        torch.empty(rows, dtype=long, device=device),
        torch.empty((2, rows), dtype=long, device=device),
    )


LIBRARY.impl(_op, _kernel, "CompositeExplicitAutograd")
torch.library.register_fake(_op, _fake, lib=LIBRARY)


def cut(
    input: Tensor,
    lengths: Tensor | Sequence[int] | None,
    offsets: Tensor | None,
    reset_mask: Tensor | None,
    batch_first: bool,
) -> Segments:
    """Cuts a batch: by an operator where what runs is recorded, as by torch.jit.trace and torch.export, for the
    numbers of steps and segments must not become part of the record.

    Args:
        input: padded [T, B, I], or the values [N, I] of a jagged tensor.
        lengths: integers [B]; None for all steps.
        offsets: integers [B + 1], those of a jagged tensor; None for padded input.
        reset_mask: bool [T, B], [B, T] when ``batch_first``: where the state is zeroed before the step; None for no
            resets.

    Raises:
        ValueError, TypeError: wrong ``lengths`` or ``reset_mask``.
        RuntimeError: within torch.onnx.export.
    """
    if not _is_recorded():
        return _cut(input, lengths, offsets, reset_mask, batch_first)
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(WHOLE_BATCHES_ONLY)
    if lengths is not None and not isinstance(lengths, Tensor):
        lengths = _as_tensor(lengths)
    if reset_mask is not None:
        _check_type_of_reset_mask(reset_mask)
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    parts = _op(input.detach(), lengths, offsets, reset_mask, batch_first)
    return Segments(*parts, recorded=True)


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
    if not parts.recorded and parts.rows.numel() == hx.size(1):
        return states
    return hx.to(h_n.dtype).index_copy(1, parts.rows, states)
