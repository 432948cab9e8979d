"""Runs the GRU in eager mode: on the fast path where it applies, else with a lighter autograd than the operators'.

Only what is plain goes without the dispatcher: dense tensors of one dtype on the CPU, of the right sizes, with no mode
of torch active. Everything else, errors included, is left to the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgru import _torch_private, fast_path
from fastgru.ops.gru import cudnn
from fastgru.ops.gru.schema import (
    GRU_OPS,
    NO_TENSORS,
    GruOps,
    despite_overwriting,
    own_state,
    run_backward,
    with_own_state,
)
from fastgru.ops.library import call


def _may_be_direct(ops: GruOps, inputs: Sequence[Tensor | None]) -> bool:
    """Whether these are the inputs of one dense layer in one direction on the backend ``cpu``."""
    # Not in a frame that Dynamo traces, as it does those below a break of its graph.
    plain = len(inputs) == 6 and ops is GRU_OPS["cpu"] and not torch.compiler.is_compiling()
    return plain and fast_path.functions is not None


class TrainFunction(torch.autograd.Function):
    """What the train operator's autograd does, at a third of its cost per call: for eager mode.

    ``apply(ops, *inputs)``, where the last five inputs may be left out if all are None: then, if all is plain and the
    backend is ``cpu``, it works without the dispatcher.
    """

    @staticmethod
    def forward(ctx: Any, ops: GruOps, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        found = fast_path.functions.train(*inputs) if _may_be_direct(ops, inputs) else None
        if found is None:
            found = call(ops.train, *inputs, *NO_TENSORS[len(inputs) :])
            # As a rule it is 0. (Dynamo, which may trace this below a break of its graph, cannot branch on it.)
            if not torch.compiler.is_compiling() and found[0]._version:
                ctx.version = found[0]._version
        output, h_n, gates = found
        ctx.set_materialize_grads(False)
        ctx.ops = ops
        if any(ctx.needs_input_grad[4::4]):
            ctx.save_for_backward(*inputs, output, gates)
        else:
            ctx.save_for_backward(*own_state((), inputs), *inputs, output, gates)
        return output, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, *need = ctx.needs_input_grad
        try:
            *inputs, output, gates = ctx.saved_tensors
        except RuntimeError as error:
            *inputs, output, gates = despite_overwriting(ctx, ctx.ops, need, True, error)
        if len(inputs) > len(need):
            inputs = with_own_state(inputs)
        if _may_be_direct(ctx.ops, inputs) and not torch.is_grad_enabled():
            found = fast_path.functions.backward(*grads, *inputs, output, gates, need[0], any(need[2:]))
            if found is not None:
                return None, *found
        rest = NO_TENSORS[len(inputs) :]
        found = run_backward(ctx.ops, (*need, *(False for _ in rest)), grads, (*inputs, *rest), output, gates)
        return None, *found[: len(inputs)]


# Without Function's own wrapper, which is for the transforms of torch.func.
train_plainly: Callable[..., tuple[Tensor, Tensor]] = _torch_private.plain_apply(TrainFunction)


class KeptGraphFunction(torch.autograd.Function):
    """The train operator of a library that keeps what its backward needs to itself: for eager mode."""

    @staticmethod
    def forward(ctx: Any, ops: GruOps, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, leaves = cudnn.keep_graph(*inputs)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.ops, ctx.graph = ops, (outputs, leaves)
        output, h_n = (t.detach() for t in outputs)
        ctx.version = output._version
        ctx.save_for_backward(*inputs, output)
        return output, h_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[1:]
        try:
            *inputs, output = ctx.saved_tensors
        except RuntimeError as error:
            *inputs, output = despite_overwriting(ctx, ctx.ops, need, False, error)
            ctx.graph = None
        need = need[:10]
        if ctx.graph is None or torch.is_grad_enabled():
            # Torch's operator cannot be differentiated twice, nor after its output was overwritten; the backward
            # operator can.
            return None, *run_backward(ctx.ops, need, grads, tuple(inputs), output, None)
        outputs, leaves = ctx.graph
        found = cudnn.differentiate(outputs, leaves, grads)
        return None, *(grad if wanted else None for grad, wanted in zip(found, need, strict=True)), None


#: What stands for the train operator in eager mode; for all others TrainFunction.
EAGER_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {"cudnn": KeptGraphFunction}


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor | None:
    """What ``ops.gru_cell`` returns where there is no gradient to record, or None where it has to be called."""
    functions = fast_path.lookup("gru", input.device, input.dtype)
    return None if functions is None else functions.cell(input, hx, w_ih, w_hh, b_ih, b_hh)


def gru(module: dict[str, Any], input: Tensor, hx: Tensor | None, save_gates: bool) -> tuple[Tensor, Tensor] | None:
    """What ``ops.gru`` returns without dropout, or None where it has to be called.

    Args:
        module: the ``__dict__`` of an nn.RNNBase: its settings and weights, as they are now.
        hx: zeros when None.
    """
    functions = fast_path.lookup("gru", input.device, input.dtype)
    if functions is None:
        return None
    found = functions.infer(module, input, hx)
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
