"""Other implementations of scaled dot-product attention, as functions of q, k and v in torch's layout [B, H, L, D].

A peer is built from the inputs it will get. One that is not installed, or that has no kernel for them, raises
PeerMissingError with what installs it or what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import PeerMissingError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgru

Function = Callable[[Tensor, Tensor, Tensor], Any]


def _fastgru(*_: Tensor) -> Function:
    return fastgru.scaled_dot_product_attention


def _torch(*_: Tensor) -> Function:
    return F.scaled_dot_product_attention


def _torch_compile(*_: Tensor) -> Function:
    torch.compiler.reset()
    return torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))


def _sdpa(backend: SDPBackend) -> Callable[..., Function]:
    def build(*inputs: Tensor) -> Function:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            attention(*inputs)
        except RuntimeError as error:
            raise PeerMissingError(f"torch has no such kernel for these tensors: {error}") from error
        return attention

    return build


def _flash_attn(*inputs: Tensor) -> Function:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise PeerMissingError("pip install flash-attn --no-build-isolation") from error
    if inputs[0].dtype == torch.float32:
        raise PeerMissingError("flash-attn has no float32")
    # Its own layout, [B, L, H, D], is that of the same memory.
    return lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _onnxruntime(*inputs: Tensor) -> Function:
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        raise PeerMissingError("pip install onnx onnxruntime") from error
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(t.shape))
        for name, t in zip("qkvy", (*inputs, inputs[0]), strict=True)
    ]
    graph = helper.make_graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], "g", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {name: t.numpy() for name, t in zip("qkv", inputs, strict=True)}
    return lambda *_: session.run(["y"], feed)[0]


def _openvino(*inputs: Tensor) -> Function:
    try:
        import openvino
        from openvino import opset13
    except ImportError as error:
        raise PeerMissingError("pip install openvino") from error
    parameters = [opset13.parameter(list(t.shape), np.float32) for t in inputs]
    attention = opset13.scaled_dot_product_attention(*parameters, causal=False)
    compiled = openvino.Core().compile_model(
        openvino.Model([attention], parameters),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # its default rounds to bf16 where the processor has it
        },
    )
    request = compiled.create_infer_request()
    for i, t in enumerate(inputs):
        request.set_input_tensor(i, openvino.Tensor(t.numpy(), shared_memory=True))

    def run(*_: Tensor) -> np.ndarray:
        request.infer()
        return np.asarray(request.get_output_tensor(0).data)

    return run


def attention_peers(device: str, dtype: str, training: bool) -> dict[str, Callable[..., Function]]:
    """Who can be measured on ``device`` in ``dtype``."""
    peers = {"fastgru": _fastgru, "torch": _torch, "torch.compile": _torch_compile}
    kernels = ("MATH",) if device == "cpu" else ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    for name in kernels:
        peers[f"torch, {name.removesuffix('_ATTENTION').lower()}"] = _sdpa(getattr(SDPBackend, name))
    if device == "cuda":
        peers["flash-attn"] = _flash_attn
    elif dtype == "float32" and not training:
        peers |= {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}
    return peers
