"""Tells torch.utils.flop_counter.FlopCounterMode what to count for the operators of this package.

By torch's conventions: two for each multiplication and addition of a matrix product, nothing for all else, and
attention as if every query saw every key. So a GRU has the count of nn.GRU with an initial state that wants its
gradient, for that is always computed here, and attention that of scaled_dot_product_attention's flash kernels, whose
backward pass makes the scores again.

torch.utils.flop_counter imports Triton, which takes longer than all else that a program may want of this package: the
formulas are registered when someone imports it, which is before any counter is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

from fastgru.ops.additive.schema import ADDITIVE_OPS
from fastgru.ops.attention.schema import ATTENTION_OPS, PLAIN_OPS
from fastgru.ops.gru.schema import GRU_OPS

_COUNTER = "torch.utils.flop_counter"

# What a formula is given: an operator's arguments, of tensors their shapes.
Shape = Sequence[int]


def _gru(input: Shape, hx: Shape, *rest: Any) -> int:
    directions, _, hidden = hx
    return 2 * directions * prod(input[:-1]) * 3 * hidden * (input[-1] + hidden)


def _gru_backward(input: Shape, hx: Shape, *rest: Any) -> int:
    *_, gates, need_input_grad, need_weight_grad = rest
    forward = _gru(input, hx)
    by_state = forward * hx[2] // (input[-1] + hx[2])
    # Gates that were not kept are made again.
    made_again = gates is None or prod(gates) == 0
    count: int = by_state + need_input_grad * (forward - by_state) + (need_weight_grad + made_again) * forward
    return count


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any) -> int:
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(query: Shape, key: Shape, value: Shape, *rest: Any) -> int:
    # Of query and key: the scores again, and two gradients. Of value: its gradient, and that of the weights.
    return 2 * prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


def _additive(query: Shape, key: Shape, weight: Shape, value: Shape, *rest: Any) -> int:
    return 2 * prod(query[:2]) * key[1] * (weight[0] + value[2])


def _additive_backward(query: Shape, key: Shape, weight: Shape, value: Shape, *rest: Any) -> int:
    # As of attention; the product with `weight` takes the place of that of query and key.
    return 2 * prod(query[:2]) * key[1] * (3 * weight[0] + 2 * value[2])


def formulas() -> dict[torch._ops.OpOverload, tuple[Callable[..., int], int]]:
    """Of every operator its formula, and how many of its arguments stand before those of the formula."""
    table: dict[torch._ops.OpOverload, tuple[Callable[..., int], int]] = {
        PLAIN_OPS.forward: (_attention, 0),
        PLAIN_OPS.backward: (_attention_backward, 1),
    }
    for gru in GRU_OPS.values():
        table |= {gru.infer: (_gru, 0), gru.train: (_gru, 0), gru.backward: (_gru_backward, 2)}
    for attention in ATTENTION_OPS.values():
        table |= {attention.forward: (_attention, 0), attention.backward: (_attention_backward, 2)}
    for additive in ADDITIVE_OPS.values():
        table |= {additive.forward: (_additive, 0), additive.backward: (_additive_backward, 1)}
    return table


def _register(counter: ModuleType) -> None:
    for op, (formula, skipped) in formulas().items():

        def count(*arguments: Any, formula: Any = formula, skipped: int = skipped, out_shape: Any = None) -> int:
            return formula(*arguments[skipped:])  # type: ignore[no-any-return]

        counter.register_flop_formula(op.overloadpacket)(count)


class _OnImport:
    """A finder that does as those behind it do, and has the module register the formulas when it has been executed."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_wanted() -> None:
    if _COUNTER in sys.modules:
        _register(importlib.import_module(_COUNTER))
    else:
        sys.meta_path.insert(0, _OnImport)
