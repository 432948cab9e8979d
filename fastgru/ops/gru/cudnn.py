"""Runs nn.GRU's own kernels on a GPU: cuDNN's (MIOpen's on AMD), or ATen's for what PyTorch keeps from them.

They are here so that ``auto`` can take them where they are faster, and to be compared with. cuDNN keeps what its
backward needs in a buffer of its own, which an operator of ours cannot return: in eager mode the autograd graph of
torch's operator is kept instead (see ``KeptGraphFunction`` in ``fastgru.ops.gru.eager``); under torch.compile backward
runs the forward pass again.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastgru._torch_private import recorded_within_operators
from fastgru.ops.gru.reference import without_gaps
from fastgru.ops.numerics import outside_autocast


@outside_autocast
def layer(train: bool, input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """One layer by torch's own operator. ``train`` makes it keep what backward needs.

    Shapes as those of the operators in ``fastgru.ops.gru.schema``.
    """
    *weights, batch_sizes = weights_and_batch_sizes
    weights = without_gaps(weights)
    given = [weight for weight in weights if weight is not None]
    options = (given, weights[2] is not None, 1, 0.0, train, weights[4] is not None)
    with warnings.catch_warnings():
        # The weights are where the user's module has them; they are gathered in a microsecond or two.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        if batch_sizes is None:
            output, h_n = torch.gru(input, hx.contiguous(), *options, False)
        else:
            output, h_n = torch.gru(input, batch_sizes, hx.contiguous(), *options)
    return output.contiguous(), h_n


def gru_infer(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """One layer, for no backward pass."""
    with torch.no_grad():
        return layer(False, input, hx, *weights_and_batch_sizes)


def gru_train(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`gru_infer`; the gates are empty, and backward makes what it needs again."""
    output, h_n = gru_infer(input, hx, *weights_and_batch_sizes)
    return output, h_n, input.new_empty(0)


def gru_backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, input: Tensor, hx: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Gradients of one layer, laid out as the operators in ``fastgru.ops.gru.schema`` have them."""
    *weights, batch_sizes, _, _, need_input_grad, need_weight_grad = rest
    outputs, leaves = keep_graph(input, hx, *weights, batch_sizes)
    grads = differentiate(outputs, leaves, (grad_output, grad_h_n))
    nothing = [input.new_empty(0) for _ in range(5)]
    grad_input = grads[0] if need_input_grad else nothing[0]
    if not need_weight_grad:
        return grad_input, grads[1], *nothing[1:]
    shapes = [w.shape for w in weights[:2]] + [weights[0].shape[:1]] * 2
    stacked = [
        torch.stack([hx.new_zeros(shape) if g is None else g for g in grads[2 + kind : 2 + kind + 4 * hx.size(0) : 4]])
        for kind, shape in enumerate(shapes)
    ]
    return grad_input, grads[1], *stacked


def keep_graph(
    input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """The layer with an autograd graph of its own: its results, and the leaves that stand for the arguments."""
    *weights, batch_sizes = weights_and_batch_sizes
    leaves = [None if t is None else t.detach().requires_grad_() for t in (input, hx, *weights)]
    # An operator's kernel is called with autograd switched off beneath it.
    assert recorded_within_operators is not None  # see fastgru.backends.cudnn
    with recorded_within_operators(), torch.enable_grad():
        return layer(True, *leaves, batch_sizes), leaves  # type: ignore[arg-type]


def differentiate(
    outputs: tuple[Tensor, Tensor], leaves: list[Tensor | None], grads: tuple[Tensor | None, ...]
) -> list[Any]:
    """Gradients of the leaves of a graph that :func:`keep_graph` made; None for those that are None."""
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(
        torch.autograd.grad([out for out, _ in pairs], present, [grad for _, grad in pairs], retain_graph=True)
        if pairs
        else [torch.zeros_like(leaf) for leaf in present]
    )
    return [None if leaf is None else next(found) for leaf in leaves]
