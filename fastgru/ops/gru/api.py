"""Runs a stack of GRU layers, or one GRU step, on the backend that the registry picks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fastgru import _torch_private
from fastgru._torch_private import forward_mode, takes_per_sample_gradients
from fastgru.backends import registry
from fastgru.ops.gru.eager import EAGER_FUNCTIONS, TrainFunction
from fastgru.ops.gru.onnx import gru_node
from fastgru.ops.gru.reference import gru_differentiable
from fastgru.ops.gru.schema import GRU_OPS
from fastgru.ops.library import call

# The names ATen prints, which nn.GRU's messages contain.
_ATEN_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}

# In the place of what a layer lacks of its eight weights.
_NO_TENSORS = (None,) * 8


def gru(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers, as nn.GRU computes it.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I] with ``batch_sizes``. Any strides.
        hx: [num_layers * D, B, H], D = 2 when ``bidirectional``.
        weights: nn.GRU's, flat: for each layer and direction w_ih, w_hh and, with ``has_biases``, b_ih, b_hh.
        dropout: probability of zeroing an element between layers when ``train`` is set.
        batch_sizes: int64 [T] on the CPU, as in a PackedSequence.
        save_gates: keep the gates for the backward pass. Otherwise it recomputes them, for less memory.

    Returns:
        output [T, B, D*H] ([B, T, D*H], packed [N, D*H]) and h_n [num_layers * D, B, H].

    Raises:
        RuntimeError: zero-length sequence; tensors of different dtypes or devices.
        BackendUnavailable: the backend asked for cannot run this.

    torch.func's transforms and forward-mode differentiation go, like double backward, through the reference backend's
    differentiable composite, whichever backend is chosen. torch.nn.utils' per-sample gradients go through torch.gru.
    """
    if has_torch_function(weights) and takes_per_sample_gradients(weights):
        whole = batch_sizes is None
        result: tuple[Tensor, Tensor] = torch.gru(  # type: ignore[call-overload]
            *((input, hx) if whole else (input, batch_sizes, hx)),
            list(weights),
            *(has_biases, num_layers, dropout, train, bidirectional),
            *((batch_first,) if whole else ()),
        )
        return result
    result_dtype = None
    if _torch_private.is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type):
        input, hx, weights, result_dtype = _autocast(input, hx, weights)
    device, dtype = input.device, input.dtype
    for t in (hx, *weights):
        if t is None or t.dtype is not dtype or t.device != device:
            _raise_unlike(input, hx, weights)
    if batch_sizes is None:
        if batch_first:
            input = input.transpose(0, 1)
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    directions = 2 if bidirectional else 1
    stride = directions * (4 if has_biases else 2)
    if len(weights) != num_layers * stride:
        raise RuntimeError(
            f"Expected {num_layers * stride} weights and biases for num_layers={num_layers}, bidirectional="
            f"{bidirectional} and bias={has_biases}, got {len(weights)}"
        )
    if has_biases:
        width = 3 * hx.size(2)
        for bias in (*weights[2::4], *weights[3::4]):
            if bias.dim() != 1 or bias.size(0) != width:
                # What torch's linear function takes for a bias: a number, [1] or [1, 3H]. Else its error.
                weights = [t.expand(1, width).squeeze(0) if i % 4 > 1 else t for i, t in enumerate(weights)]
                break
    transformed = _torch_private.are_functorch_transforms_active() or forward_mode._current_level >= 0
    compiling = torch.compiler.is_compiling()
    # What torch.jit.trace records has to be an operator, and the same one without gradients.
    records_gates = save_gates and torch.is_grad_enabled() and (compiling or not _torch_private.is_tracing())
    exporting_onnx = compiling and torch.onnx.is_in_onnx_export()
    backend = registry.select("gru", device, dtype)
    if registry.goes_by_problem("gru", backend):
        sizes = None
        if not compiling:
            steps = input.size(0) if batch_sizes is None else batch_sizes.size(0)
            training = torch.is_grad_enabled() and any(t.requires_grad for t in (input, hx, *weights))
            sizes = registry.Sizes(hx.size(2), hx.size(1), steps, directions, training, batch_sizes is not None)
        backend = registry.fastest("gru", device, dtype, sizes)
    ops = GRU_OPS[backend.name]

    states = []
    x = input
    for layer in range(num_layers):
        layer_hx = hx if num_layers == 1 else hx[layer * directions : (layer + 1) * directions]
        own: Sequence[Any] = weights if num_layers == 1 else weights[layer * stride : (layer + 1) * stride]
        if not has_biases:
            own = [*own[:2], None, None, *own[2:]]
        arguments: list[Any] = [x, layer_hx, *own, *_NO_TENSORS[len(own) :], batch_sizes]
        if exporting_onnx:
            x, h_n = gru_node(*arguments)
        elif transformed:
            x, h_n = gru_differentiable(*arguments)
        elif not (records_gates and any(t is not None and t.requires_grad for t in arguments)):
            x, h_n = call(ops.infer, *arguments)
        elif compiling:
            x, h_n, _ = ops.train(*arguments)
        else:
            function = EAGER_FUNCTIONS.get(backend.name)
            if function is None:
                function = TrainFunction
                if len(own) == 4 and batch_sizes is None:
                    del arguments[6:]
            x, h_n = function.apply(ops, *arguments)
        states.append(h_n)
        if train and layer + 1 < num_layers and dropout != 0:
            x = torch.dropout(x, dropout, True)
    h_n = states[0] if num_layers == 1 else torch.cat(states)
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    if result_dtype is not None:
        x, h_n = x.to(result_dtype), h_n.to(result_dtype)
    return x, h_n


def gru_cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """One GRU step: the state after ``hx`` [B, H] has seen ``input`` [B, I]. A bias that is None is zero.

    Raises:
        TypeError: a weight that is None.
        RuntimeError: sizes that do not fit each other or the weights; different dtypes or devices.
        BackendUnavailable: the backend asked for cannot run this.
    """
    if w_ih is None or w_hh is None:
        raise TypeError(f"{'weight_ih' if w_ih is None else 'weight_hh'} has to be a tensor, got None")
    if input.size(1) != w_ih.size(1):
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {w_ih.size(1)}")
    if input.size(0) != hx.size(0):
        raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden0 batch size {hx.size(0)}")
    if hx.size(1) != w_hh.size(1):
        raise RuntimeError(f"hidden0 has inconsistent hidden_size: got {hx.size(1)}, expected {w_hh.size(1)}")
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        weights += [w_ih.new_zeros(w_ih.size(0)) if bias is None else bias for bias in (b_ih, b_hh)]
    _, h_n = gru(input.unsqueeze(0), hx.unsqueeze(0), weights, len(weights) == 4, 1, 0.0, False, False, False)
    return h_n.squeeze(0)


def _raise_unlike(input: Tensor, hx: Tensor, weights: Sequence[Tensor]) -> NoReturn:
    """nn.GRU leaves the check of weights, devices and dtypes to its kernels; these are their messages."""
    for i, weight in enumerate(weights):
        if weight is None:
            raise TypeError(f"expected a tensor as weight {i} of {len(weights)}, got None")
    for kind, t in [("hidden", hx), *(("parameter", weight) for weight in weights)]:
        if t.device != input.device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} "
                f"and {kind} tensor at {t.device}"
            )
    first = weights[0]
    for left in (input, hx):
        if left.dtype is not first.dtype:
            raise RuntimeError(_dtype_message(left, first, "mat1"))
    odd = next(weight for weight in weights if weight.dtype is not input.dtype)
    raise RuntimeError(_dtype_message(input, odd, "self"))


def _dtype_message(left: Tensor, right: Tensor, name: str) -> str:
    left_name, right_name = (_ATEN_NAMES.get(t.dtype, str(t.dtype)) for t in (left, right))
    return f"{name} and mat2 must have the same dtype, but got {left_name} and {right_name}"


def _autocast(
    input: Tensor, hx: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor], torch.dtype]:
    """Casts as nn.GRU does under autocast: neither float64 nor what is no float. On the CPU that casts only products,
    and the state gives the result's type."""
    device = input.device.type
    dtype = torch.get_autocast_dtype(device)
    if input.dtype is torch.float64:
        result = input.dtype
    else:
        result = torch.promote_types(hx.dtype, dtype) if device == "cpu" else dtype
    input, hx, *weights = (
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t
        for t in (input, hx, *weights)
    )
    return input, hx, weights, result
