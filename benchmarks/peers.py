"""Other implementations of the same layer, each at its best settings with the same number of threads.

A peer is built from a torch.nn.GRU and an input and becomes a function of no arguments that runs the forward pass and
returns the output. One that is not installed raises PeerMissingError with the line that installs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import fastgru

Forward = Callable[[], Any]


class PeerMissingError(Exception):
    """The peer is not installed; the message says how to install it."""


def _fastgru(gru: nn.GRU, x: torch.Tensor) -> Forward:
    module = fastgru.GRU(gru.input_size, gru.hidden_size, dtype=x.dtype)
    module.load_state_dict(gru.state_dict())
    return _torch_forward(module, x)


def _torch_forward(module: nn.Module, x: torch.Tensor) -> Forward:
    hx = x.new_zeros(1, x.size(1), module.hidden_size)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return module(x, hx)[0]

    return forward


def _torch_compile(gru: nn.GRU, x: torch.Tensor) -> Forward:
    return _torch_forward(torch.compile(gru), x)


def onnx_model(gru: nn.GRU, x: torch.Tensor) -> bytes:
    """One ONNX GRU node. Its gates come in the order z, r, n; linear_before_reset=1 is torch's formula."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise PeerMissingError("pip install onnx onnxruntime openvino") from error
    T, B, I = x.shape
    H = gru.hidden_size

    def reorder(weight: torch.Tensor) -> np.ndarray:
        r, z, n = weight.detach().float().chunk(3)
        return torch.cat([z, r, n]).numpy()

    constants = {
        "W": reorder(gru.weight_ih_l0)[None],
        "R": reorder(gru.weight_hh_l0)[None],
        "bias": np.concatenate([reorder(gru.bias_ih_l0), reorder(gru.bias_hh_l0)])[None],
    }
    node = helper.make_node(
        "GRU", ["x", "W", "R", "bias", "", "h0"], ["y", "h_n"], hidden_size=H, linear_before_reset=1
    )
    graph = helper.make_graph(
        [node],
        "gru",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, I]),
            helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, B, H]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, 1, B, H]),
            helper.make_tensor_value_info("h_n", TensorProto.FLOAT, [1, B, H]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _onnxruntime(gru: nn.GRU, x: torch.Tensor) -> Forward:
    try:
        import onnxruntime
    except ImportError as error:
        raise PeerMissingError("pip install onnx onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_model(gru, x), options, ["CPUExecutionProvider"])
    feed = {"x": x.numpy(), "h0": np.zeros((1, x.size(1), gru.hidden_size), np.float32)}
    return lambda: session.run(["y"], feed)[0][:, 0]


def _openvino(gru: nn.GRU, x: torch.Tensor) -> Forward:
    try:
        import openvino
    except ImportError as error:
        raise PeerMissingError("pip install onnx openvino") from error
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(onnx_model(gru, x)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # its default rounds to bf16 where the processor has it
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(0, openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_input_tensor(1, openvino.Tensor(np.zeros((1, x.size(1), gru.hidden_size), np.float32)))

    def forward() -> np.ndarray:
        request.infer()
        return np.asarray(request.get_output_tensor(0).data)[:, 0]

    return forward


FORWARD: dict[str, Callable[[nn.GRU, torch.Tensor], Forward]] = {
    "fastgru": _fastgru,
    "nn.GRU": _torch_forward,
    "torch.compile": _torch_compile,
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
}


def training_step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Forward:
    """Forward and backward to every weight and to the input, gradients written anew."""
    x = x.detach().requires_grad_()
    hx = x.new_zeros(1, x.size(1), module.hidden_size)
    parameters = [x, *module.parameters()]

    def step() -> tuple[torch.Tensor, ...]:
        output, _ = module(x, hx)
        return torch.autograd.grad(output, parameters, grad)

    return step


def _fastgru_training(gru: nn.GRU, x: torch.Tensor, grad: torch.Tensor) -> Forward:
    module = fastgru.GRU(gru.input_size, gru.hidden_size, dtype=x.dtype)
    module.load_state_dict(gru.state_dict())
    return training_step(module, x, grad)


TRAINING: dict[str, Callable[[nn.GRU, torch.Tensor, torch.Tensor], Forward]] = {
    "fastgru": _fastgru_training,
    "nn.GRU": training_step,
}
