"""Decomposes the operators of this package into torch's own, for tools that read an exported program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgru.ops.additive.reference import additive_differentiable
from fastgru.ops.additive.schema import ADDITIVE_OPS
from fastgru.ops.attention.reference import attention_differentiable
from fastgru.ops.attention.schema import ATTENTION_OPS
from fastgru.ops.gru.schema import GRU_OPS


def _gru_infer(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> Any:
    *weights, batch_sizes = weights_and_batch_sizes
    if batch_sizes is not None:
        # How many steps there are is known at run time only.
        return NotImplemented
    given = [weight for weight in weights if weight is not None]
    return torch.gru(input, hx, given, weights[2] is not None, 1, 0.0, False, weights[4] is not None, False)


def _gru_train(input: Tensor, hx: Tensor, *weights_and_batch_sizes: Tensor | None) -> Any:
    results = _gru_infer(input, hx, *weights_and_batch_sizes)
    # No gates: the backward operators, which are not decomposed, refuse what they did not lay out themselves.
    return results if results is NotImplemented else (*results, input.new_empty(0))


# No statistics either: an exporter may keep the node that takes them of the results.
def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, lse = attention_differentiable(*arguments)
    return output, lse, lse.new_empty(0)


def _additive(*arguments: Any) -> tuple[Tensor, Tensor]:
    output = additive_differentiable(*arguments)
    return output, output.new_empty(0)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """A table of decompositions of this package's operators, as ``ExportedProgram.run_decompositions`` takes it.

    ``torch.gru`` stands for a layer, and plain operations for attention::

        table = torch.export.default_decompositions()
        table.update(fastgru.decompositions())
        program = torch.export.export(model, arguments).run_decompositions(table)

    torch's default table cuts ``aten.gru`` into its steps, as it does for ``nn.GRU``; without
    ``torch.ops.aten.gru.input`` in it a layer is kept whole. Packed input stays with the operators of this package,
    and so do ``lengths``, resets and backward passes.
    """
    table: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
    for gru in GRU_OPS.values():
        table |= {gru.infer: _gru_infer, gru.train: _gru_train}
    for attention in ATTENTION_OPS.values():
        table[attention.forward] = _attention
    for additive in ADDITIVE_OPS.values():
        table[additive.forward] = _additive
    return table
