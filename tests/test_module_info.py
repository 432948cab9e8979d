"""The generic checks that PyTorch runs on its own modules, on its own inputs, for fastgru's.

The inputs, with their references and their error cases, are the ``ModuleInfo`` entries of nn.GRU and nn.GRUCell; torch
does not ship the checks themselves, so they are written here. No check is expected to fail.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgru

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

_THEIRS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in (nn.GRU, nn.GRUCell)}
INFOS = {
    "GRU": common_modules.ModuleInfo(
        fastgru.GRU,
        train_and_eval_differ=True,
        module_inputs_func=partial(_THEIRS[nn.GRU].module_inputs_func, with_packed_sequence=True),
        module_error_inputs_func=_THEIRS[nn.GRU].module_error_inputs_func,
    ),
    "GRUCell": common_modules.ModuleInfo(
        fastgru.GRUCell,
        module_inputs_func=_THEIRS[nn.GRUCell].module_inputs_func,
        module_error_inputs_func=_THEIRS[nn.GRUCell].module_error_inputs_func,
    ),
}

every_module = pytest.mark.parametrize("name", INFOS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
train_and_eval = pytest.mark.parametrize("training", [False, True])


def samples(
    name: str, dtype: torch.dtype, training: bool = True, requires_grad: bool = False
) -> Iterator[tuple[Any, Any, Any]]:
    """(module, positional arguments of a call, reference function or None)."""
    info = INFOS[name]
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    assert inputs
    for sample in inputs:
        if sample.forward_input is None:
            continue
        constructor = sample.constructor_input
        module = info.module_cls(*constructor.args, **constructor.kwargs, dtype=dtype, device="cpu").train(training)
        assert not sample.forward_input.kwargs
        yield module, sample.forward_input.args, sample.reference_fn


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def leaves(arguments: Any) -> list[Tensor]:
    return [t for t in tensors(arguments) if t.is_floating_point()]


@every_module
@every_dtype
@train_and_eval
def test_forward_against_the_reference(backend: str, name: str, dtype: torch.dtype, training: bool) -> None:
    for module, arguments, reference in samples(name, dtype, training):
        got = module(*arguments)
        if reference is not None and not isinstance(arguments[0], PackedSequence):
            want = reference(module, *arguments)
            torch.testing.assert_close(got, want, check_stride=False)


@every_module
def test_factory_kwargs(name: str) -> None:
    info = INFOS[name]
    for sample in info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        for device, dtype in itertools.product(("cpu", "meta"), (torch.float64, torch.bfloat16)):
            module = info.module_cls(*args, **kwargs, device=device, dtype=dtype)
            for tensor in itertools.chain(module.parameters(), module.buffers()):
                assert (tensor.device.type, tensor.dtype) == (device, dtype)
        for tensor in info.module_cls(*args, **kwargs).parameters():
            assert (tensor.device.type, tensor.dtype) == ("cpu", torch.get_default_dtype())


@every_module
@train_and_eval
def test_non_contiguous(backend: str, name: str, training: bool) -> None:
    def strided(tensor: Tensor) -> Tensor:
        """The same numbers, each followed by one that is not part of it."""
        if not tensor.is_floating_point():
            return tensor
        spread = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], dim=-1)[..., 0]
        return spread.requires_grad_()

    for module, arguments, _ in samples(name, torch.float64, training, requires_grad=True):
        if isinstance(arguments[0], PackedSequence):
            continue  # One tensor of rows, which is never strided.
        results = []
        scattered = tuple(map(strided, arguments))
        assert any(t.numel() > 1 and not t.is_contiguous() for t in scattered)
        for given in (arguments, scattered):
            outputs = tensors(module(*given))
            # An expanded gradient is not contiguous either.
            loss = sum(out.sum() for out in outputs)
            results.append([outputs, torch.autograd.grad(loss, [*leaves(given), *module.parameters()])])
        torch.testing.assert_close(*results, check_stride=False)


def differentiable(module: nn.Module, arguments: Any) -> tuple[Any, list[Tensor]]:
    """The call as a function of its tensors, and these: input, state, parameters."""
    names = [name for name, _ in module.named_parameters()]
    first, *rest = arguments
    packed = isinstance(first, PackedSequence)

    def function(x: Tensor, *values: Tensor) -> Any:
        given = (PackedSequence(x, *first[1:]) if packed else x, *values[: len(rest)])
        weights = dict(zip(names, values[len(rest) :], strict=True))
        return tuple(t for t in tensors(torch.func.functional_call(module, weights, given)) if t.is_floating_point())

    values = [first.data if packed else first, *rest, *module.parameters()]
    return function, [t.detach().requires_grad_() for t in values]


@every_module
@train_and_eval
def test_grad(backend: str, name: str, training: bool) -> None:
    for module, arguments, _ in samples(name, torch.float64, training):
        assert gradcheck(*differentiable(module, arguments), fast_mode=True)


@every_module
def test_gradgrad(backend: str, name: str) -> None:
    # In eval mode, where cuDNN refuses even the first derivative. It takes its time: every fifth of the entries, which
    # meets each of their options.
    for module, arguments, _ in itertools.islice(samples(name, torch.float64, training=False), 0, None, 5):
        assert gradgradcheck(*differentiable(module, arguments), fast_mode=True)


@every_module
@train_and_eval
def test_save_and_load(name: str, training: bool) -> None:
    for module, arguments, _ in samples(name, torch.float32, training):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert loaded.training == training
        assert all(map(torch.equal, tensors(loaded(*arguments)), tensors(module(*arguments))))


@every_module
def test_repr(name: str) -> None:
    for module, _, _ in samples(name, torch.float32):
        assert repr(module).startswith(f"{name}(")
        assert str(module) == repr(module)


@every_module
def test_train_and_eval_differ_by_dropout_only(name: str) -> None:
    for module, arguments, _ in samples(name, torch.float32):
        for mode in (True, False):
            assert module.train(mode).training is mode
            torch.manual_seed(1)
            got = tensors(copy.deepcopy(module)(*arguments))
            torch.manual_seed(1)
            assert all(map(torch.equal, got, tensors(module(*arguments))))


@every_module
@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_device_transfer(name: str, device: str) -> None:
    for module, arguments, _ in samples(name, torch.float32):
        want = tensors(module(*arguments))
        moved = module.to(device)
        assert moved is module
        given = [
            t.to(device) if isinstance(t, PackedSequence) else tree_map_only(Tensor, lambda t: t.to(device), t)
            for t in arguments
        ]
        got = tensors(moved(*given))
        assert [t.shape for t in got] == [t.shape for t in want]
        assert all(t.device.type == device for t in got if t.is_floating_point())
        if device != "meta":
            torch.testing.assert_close([t.cpu() for t in got], want)
        sum(t.sum() for t in got if t.is_floating_point()).backward()
        assert all(p.grad.device.type == device for p in module.parameters())


@every_module
def test_error_inputs(backend: str, name: str) -> None:
    info = INFOS[name]
    cases = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    assert cases
    for case in cases:
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        if case.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                info.module_cls(*constructor.args, **constructor.kwargs)
        else:
            module = info.module_cls(*constructor.args, **constructor.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*forward.args, **forward.kwargs)
