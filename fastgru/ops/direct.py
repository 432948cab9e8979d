"""Calls of the backend ``cpu`` that go without torch's dispatcher, whose way from Python to a kernel and back takes
longer than a step of a small GRU.

Only what is plain: dense tensors of one dtype on the CPU, of the right sizes, in eager mode with no mode of torch
active. Everything else, errors included, is left to the operators.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgru import _lib
from fastgru._torch_private import forward_mode
from fastgru.backends import registry
from fastgru.ops.schema import GRU_OPS, train_plainly

_direct = _lib.direct


def _may_run(input: Tensor) -> bool:
    if _direct is None or forward_mode._current_level >= 0:
        return False
    # At the first call there is none: the operators' way has it chosen.
    backend = registry.selected(input.device, input.dtype)
    return backend is not None and backend.name == "cpu"


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor | None:
    """What ``ops.gru_cell`` returns where there is no gradient to record, or None where it has to be called."""
    return _direct.cell(input, hx, w_ih, w_hh, b_ih, b_hh) if _may_run(input) else None


def gru(module: dict[str, Any], input: Tensor, hx: Tensor | None, save_gates: bool) -> tuple[Tensor, Tensor] | None:
    """What ``ops.gru`` returns without dropout, or None where it has to be called.

    Args:
        module: the ``__dict__`` of an nn.RNNBase: its settings and weights, as they are now.
        hx: zeros when None.
    """
    if not _may_run(input):
        return None
    found = _direct.infer(module, input, hx)
    if found is None:
        return None
    batch_first = module["batch_first"]
    if found is True:
        # Plain, but there is a gradient to record.
        if module["bidirectional"] or not save_gates:
            return None
        parameters = module["_parameters"]
        weights = [parameters[name] for name in module["_flat_weights_names"]]
        if batch_first:
            input = input.transpose(0, 1)
        if hx is None:
            hx = input.new_zeros(1, input.size(1), weights[1].size(1))
        if not module["bias"]:
            weights += (None, None)
        found = train_plainly(GRU_OPS["cpu"], input, hx, *weights)
    output, h_n = found
    return (output.transpose(0, 1) if batch_first else output), h_n
