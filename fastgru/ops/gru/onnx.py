"""Writes a layer as a node of ONNX, for torch.onnx.export.

ONNX stores the gates in the order z, r, n, and its ``linear_before_reset=1`` is the GRU of torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WHOLE_BATCHES_ONLY = (
    "torch.onnx.export takes a fastgru.GRU on whole batches, not on packed input, lengths, resets or nested tensors"
)


def gru_node(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """A ``GRU`` node: output [T, B, D * H] and h_n [D, B, H], from the arguments of the operators.

    Args:
        input: [T, B, I].
        hx: [D, B, H].
        weights_and_batch_sizes: w_ih, w_hh, b_ih, b_hh, the same four of the reverse direction, None where there is
            none, and None.

    Raises:
        RuntimeError: the input is packed.
    """
    *weights, batch_sizes = weights_and_batch_sizes
    if batch_sizes is not None:
        raise RuntimeError(WHOLE_BATCHES_ONLY)
    T, B, _ = input.shape
    D, _, H = hx.shape
    w_ih, w_hh, b_ih, b_hh = zip(weights[:4], weights[4:], strict=True)
    biases = [_stacked(b_ih[:D]), _stacked(b_hh[:D])] if b_ih[0] is not None else []
    nodes: list[Tensor | None] = [input, _stacked(w_ih[:D]), _stacked(w_hh[:D])]
    nodes += [torch.cat(biases, 1) if biases else None, None, hx]
    output, h_n = torch.onnx.ops.symbolic_multi_out(
        "GRU",
        nodes,
        {"direction": "bidirectional" if D == 2 else "forward", "hidden_size": H, "linear_before_reset": 1},
        dtypes=(input.dtype, input.dtype),
        shapes=((T, D, B, H), (D, B, H)),
        version=14,
    )
    return output.transpose(1, 2).reshape(T, B, D * H), h_n


def _stacked(weights: Sequence[Tensor | None]) -> Tensor:
    """[D, 3H, ...] in the order of ONNX."""
    ordered = []
    for weight in weights:
        assert weight is not None
        hidden = weight.size(0) // 3
        # Slices, which the exporter can carry out on the weights; a split would stay in the graph.
        ordered.append(torch.cat([weight[hidden : 2 * hidden], weight[:hidden], weight[2 * hidden :]]))
    return torch.stack(ordered)
