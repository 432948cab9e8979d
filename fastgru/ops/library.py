"""Defines operators in the namespace ``fastgru``, and calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgru import _torch_private

LIBRARY = torch.library.Library("fastgru", "DEF")


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Calls an operator. With no gradient to record it goes below autograd, whose way through Python is longer than a
    step of a small GRU; in inference mode torch does so itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*arguments)
    with _torch_private.below_autograd():
        return op(*arguments)


def gradients(
    outputs: list[Tensor], inputs: list[Tensor | None], seeds: list[Tensor], create_graph: bool
) -> list[Tensor | None]:
    """torch.autograd.grad that leaves None where an input is None or not used."""
    present = [t for t in inputs if t is not None]
    if not outputs or not present:
        return [None] * len(inputs)
    grads = iter(torch.autograd.grad(outputs, present, seeds, create_graph=create_graph, allow_unused=True))
    return [None if t is None else next(grads) for t in inputs]


LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("cpu_isas() -> str")
LIBRARY.define("cpu_set_isa(str name) -> ()")
LIBRARY.define("cpu_set_poison(bool on) -> ()")
LIBRARY.define("cpu_set_chunk_tokens(int tokens) -> ()")
LIBRARY.define("cuda_versions() -> (int runtime, int driver)")
LIBRARY.define("cuda_code_architecture(int device) -> int")
LIBRARY.define("cuda_upload(Tensor host, Tensor(a!) device) -> ()")
LIBRARY.define("cuda_load(str path, str symbol, int device, int shared) -> ()")
LIBRARY.define(
    "cuda_launch(Tensor(a!)[] tensors, str path, str symbol, int device, int programs, bool cooperative, "
    "int threads, int shared, int[] plan, float[] numbers) -> ()"
)
