"""Other implementations of the same layer, each at its best settings with the same number of threads.

A peer is built from a torch.nn.GRU and an input and becomes a function of no arguments that runs the forward pass and
returns the output, to be called in torch.inference_mode(), or a training step that returns the gradients. One that is
not installed raises PeerMissingError with the line that installs it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import fastgru
from fastgru.backends import registry

Forward = Callable[[], Any]


class PeerMissingError(Exception):
    """The peer is not installed; the message says how to install it."""


def _ours(gru: nn.GRU, x: torch.Tensor, **options: Any) -> fastgru.GRU:
    module = fastgru.GRU(gru.input_size, gru.hidden_size, dtype=x.dtype, device=x.device, **options)
    module.load_state_dict(gru.state_dict())
    return module


def _fastgru(gru: nn.GRU, x: torch.Tensor) -> Forward:
    return _torch_forward(_ours(gru, x), x)


def _torch_forward(module: nn.Module, x: torch.Tensor) -> Forward:
    hx = x.new_zeros(1, x.size(1), module.hidden_size)
    return lambda: module(x, hx)[0]


def _torch_compile(gru: nn.GRU, x: torch.Tensor) -> Forward:
    torch.compiler.reset()
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


def _keras_layer(gru: nn.GRU) -> Any:
    """Keras' layer with the weights of ``gru``. Its gates come in the order z, r, n, its weights transposed."""
    # Read when keras is imported for the first time.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras
    except ImportError as error:
        raise PeerMissingError("pip install keras") from error
    if keras.backend.backend() != "torch":
        raise PeerMissingError("KERAS_BACKEND=torch")
    layer = keras.layers.GRU(gru.hidden_size, return_sequences=True, reset_after=True)
    layer.build((None, None, gru.input_size))

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        r, z, n = weight.detach().cpu().chunk(3)
        return torch.cat([z, r, n]).float()

    bias = torch.stack([reorder(gru.bias_ih_l0), reorder(gru.bias_hh_l0)])
    layer.set_weights([reorder(gru.weight_ih_l0).T.numpy(), reorder(gru.weight_hh_l0).T.numpy(), bias.numpy()])
    return layer


def _keras(gru: nn.GRU, x: torch.Tensor) -> Forward:
    layer = _keras_layer(gru)
    batch_first = x.transpose(0, 1).contiguous()
    return lambda: layer(batch_first).transpose(0, 1)


FORWARD: dict[str, Callable[[nn.GRU, torch.Tensor], Forward]] = {
    "fastgru": _fastgru,
    "nn.GRU": _torch_forward,
    "torch.compile": _torch_compile,
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
    "Keras": _keras,
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


def _fastgru_training(gru: nn.GRU, x: torch.Tensor, grad: torch.Tensor, **options: Any) -> Forward:
    return training_step(_ours(gru, x, **options), x, grad)


def _torch_compile_training(gru: nn.GRU, x: torch.Tensor, grad: torch.Tensor) -> Forward:
    torch.compiler.reset()
    return training_step(torch.compile(gru), x, grad)


def _keras_training(gru: nn.GRU, x: torch.Tensor, grad: torch.Tensor) -> Forward:
    layer = _keras_layer(gru)
    batch_first = x.transpose(0, 1).contiguous().requires_grad_()
    grad = grad.transpose(0, 1).contiguous()
    parameters = [batch_first, *(weight.value for weight in layer.trainable_weights)]

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(batch_first, training=True), parameters, grad)

    return step


TRAINING: dict[str, Callable[[nn.GRU, torch.Tensor, torch.Tensor], Forward]] = {
    "fastgru": _fastgru_training,
    "fastgru, save_gates=False": functools.partial(_fastgru_training, save_gates=False),
    "nn.GRU": training_step,
    "torch.compile": _torch_compile_training,
    "Keras": _keras_training,
}


def as_torch(peer: str, gradients: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The gradients of a training step of ``peer`` in torch's shapes and order."""
    if peer != "Keras":
        return list(gradients)

    def reorder(weight: torch.Tensor) -> torch.Tensor:
        z, r, n = weight.chunk(3)
        return torch.cat([r, z, n])

    x, kernel, recurrent, bias = gradients
    return [x.transpose(0, 1), reorder(kernel.T), reorder(recurrent.T), *(reorder(part) for part in bias)]


def _on_backend(name: str, build: Callable[..., Forward]) -> Callable[..., Forward]:
    """``build`` on the backend ``name``, which is chosen anew in every call: some microseconds of the host's time."""

    def built(*arguments: Any) -> Forward:
        try:
            with fastgru.use_backend(name):
                function = build(*arguments)
        except fastgru.BackendUnavailable as error:
            raise PeerMissingError(str(error)) from error

        def call() -> Any:
            with fastgru.use_backend(name):
                return function()

        return call

    return built


def gru_peers(device: str, training: bool) -> dict[str, Callable[..., Forward]]:
    """Who can be measured on ``device``. On a GPU nn.GRU is cuDNN, and each of our backends stands by itself, too."""
    peers: dict[str, Callable[..., Forward]] = dict(TRAINING if training else FORWARD)
    if device == "cpu":
        return peers
    chosen = {name: build for name, build in peers.items() if name.startswith("fastgru")}
    for backend in registry.backends("gru"):
        if device in backend.devices:
            chosen[f"fastgru, {backend.name}"] = _on_backend(backend.name, peers["fastgru"])
    return chosen | {name: peers[name] for name in ("nn.GRU", "torch.compile")}
