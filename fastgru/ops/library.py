"""Defines the operators of the namespace ``fastgru`` by families, and calls them.

A family is a few operators, its *passes*, on several backends: ``fastgru::<backend>_<family>_<pass>``. Schema, fake
kernel and autograd formula are those of the family; only the implementation is the backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgru import _torch_private
from fastgru.backends import registry

LIBRARY = torch.library.Library("fastgru", "DEF")

_Operators = TypeVar("_Operators", bound=tuple[torch._ops.OpOverload, ...])


class Pass(NamedTuple):
    """What the operators of one pass have in common.

    Args:
        signature: arguments and results, as torch.library takes them.
        fake: the fake kernel.
        save: ``setup_context`` of autograd.
        differentiate: makes the autograd formula from the operators of one backend.
    """

    signature: str
    fake: Callable[..., Any]
    save: Callable[..., None]
    differentiate: Callable[[Any], Callable[..., Any]]


def define_family(
    family: str,
    backend: str,
    passes: Mapping[str, Pass],
    operators: Callable[..., _Operators],
    kernels: Sequence[Callable[..., Any]] = (),
    key: str = "CompositeExplicitAutograd",
    implementation: registry.Implementation | None = None,
) -> _Operators:
    """Defines the operators of a family on one backend, and tells the registry.

    Args:
        passes: by the names of the passes.
        operators: the NamedTuple, in the order of ``passes``, to return.
        kernels: in that order; none where the compiled library brings them.
        key: the dispatch key of ``kernels``.
        implementation: what the registry is told; by default that the backend takes every problem, the faster for it.
    """
    names = [f"{backend}_{family}_{name}" for name in passes]
    for name, one in zip(names, passes.values(), strict=True):
        LIBRARY.define(f"{name}{one.signature}", tags=torch.Tag.pt2_compliant_tag)
    ops = operators(*(getattr(torch.ops.fastgru, name).default for name in names))
    for op, one in zip(ops, passes.values(), strict=True):
        torch.library.register_fake(op, one.fake, lib=LIBRARY)
        torch.library.register_autograd(op, one.differentiate(ops), setup_context=one.save, lib=LIBRARY)
    for op, kernel in zip(ops, kernels, strict=bool(kernels)):
        LIBRARY.impl(op, kernel, key)
    registry.implement(family, backend, implementation or registry.Implementation())
    return ops


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


def second_order(
    composite: Callable[..., Sequence[Tensor]],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    need: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of a backward operator, total in ``grads`` and ``inputs``, None where it is not needed.

    Differentiates the composite twice, so nothing has to flow through what the forward operator saved.

    Args:
        composite: the forward pass in plain torch, of ``inputs``.
        grads: gradients of its results.
        inputs: what the backward operator has gradients of.
        grad_grads: of each of these gradients.
        need: for ``grads`` and ``inputs``.
    """
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias for what is already in a graph, so that a third derivative can be taken.
        leaves: list[Any] = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (*grads, *inputs)
        ]
        seeds, own = leaves[: len(grads)], leaves[len(grads) :]
        pairs = [pair for pair in zip(composite(*own), seeds, strict=True) if pair[1] is not None]
        first = gradients([out for out, _ in pairs], own, [seed for _, seed in pairs], create_graph=True)
        both = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if g is not None and gg is not None]
        wanted = [leaf if needed else None for leaf, needed in zip(leaves, need, strict=False)]
        return gradients([g for g, _ in both], wanted, [gg for _, gg in both], create_graph=keep_graph)


LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("cpu_isas() -> str")
LIBRARY.define("cpu_backoffs() -> int")
LIBRARY.define("cpu_release_memory() -> ()")
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
