"""Attention's arguments: subclasses, nested tensors, sizes of 0, numbers of the wrong kind, errors, what is kept."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import fastgru
from fastgru import flash_attn

B, H, L, S, D, E = 2, 3, 5, 7, 4, 6
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


def qkv(*sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value of sizes B, H, L, S, D, as far as they are given."""
    batch, heads, queries, keys, columns = (*sizes, *(B, H, L, S, D)[len(sizes) :])
    return [
        torch.randn(batch, heads, length, columns, dtype=dtype).requires_grad_() for length in (queries, keys, keys)
    ]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
    output = function(*tensors, *args, **options)
    return [output, *torch.autograd.grad(output.sin().sum(), tensors, allow_unused=True, materialize_grads=True)]


def modules(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    theirs = nn.MultiheadAttention(E, 2, dtype=dtype, **options)
    ours = fastgru.MultiheadAttention(E, 2, dtype=dtype, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# ---- subclasses ----


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sizes", [(5, 7), (5, 5), (3, 9)], ids=str)
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_biases(backend: str, bias: Any, sizes: tuple[int, int], grad: bool) -> None:
    tensors = qkv(B, H, *sizes)
    mask = bias(*sizes)
    with torch.set_grad_enabled(grad):
        got = fastgru.scaled_dot_product_attention(*tensors, attn_mask=mask)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*tensors, attn_mask=mask))
        torch.testing.assert_close(fastgru.flash_attention(*tensors, attn_mask=mask), got)
    with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
        fastgru.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=True)


def test_causal_biases_of_other_lengths(backend: str) -> None:
    tensors = qkv()
    # As torch takes it.
    mask = causal_upper_left(L + 1, S + 1)
    torch.testing.assert_close(
        fastgru.scaled_dot_product_attention(*tensors, attn_mask=mask),
        F.scaled_dot_product_attention(*tensors, attn_mask=mask),
    )
    with pytest.raises(RuntimeError, match="attn_mask must be broadcastable"):
        fastgru.scaled_dot_product_attention(*tensors, attn_mask=causal_lower_right(L + 1, S + 1))
    with pytest.raises(ValueError, match="attn_mask must be broadcastable"):
        fastgru.flash_attention(*tensors, attn_mask=causal_upper_left(L + 1, S + 1))
    with pytest.raises(ValueError, match="bias must be floating"):
        fastgru.flash_attention(*tensors, bias=causal_upper_left(L, S))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_modules(bias: Any, need_weights: bool) -> None:
    for heads in (1, 2):  # torch reads the memory of a tensor [1 or 2, L, S] that no one has written
        module = fastgru.MultiheadAttention(E, heads, batch_first=True)
        x, memory = torch.randn(1, L, E), torch.randn(1, S, E)
        hides = torch.ones(L, S, dtype=torch.bool).tril(0 if bias is causal_upper_left else S - L).logical_not()
        want = module(x, memory, memory, attn_mask=hides, need_weights=need_weights)
        got = module(x, memory, memory, attn_mask=bias(L, S), need_weights=need_weights)
        torch.testing.assert_close(got, want)


class Marked(Tensor):
    """Counts what it is asked to do."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Refusing(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


FUNCTIONS: list[tuple[Any, list[str]]] = [
    (fastgru.scaled_dot_product_attention, ["query", "key", "value", "attn_mask"]),
    (
        fastgru.flash_attention,
        ["query", "key", "value", "attn_mask", "bias", "alibi_slopes", "q_lengths", "k_lengths"],
    ),
    (fastgru.additive_attention, ["query", "key", "value", "weight", "k_lengths"]),
]


def arguments_of(function: Any, names: list[str]) -> dict[str, Tensor]:
    if function is fastgru.additive_attention:
        shapes = {"query": (B, L, D), "key": (B, S, D), "value": (B, S, 3), "weight": (D,)}
        return {**{name: torch.randn(shape) for name, shape in shapes.items()}, "k_lengths": torch.tensor([S, 2])}
    query, key, value = (t.detach().float() for t in qkv())
    everything = {
        "attn_mask": torch.rand(L, S) < 0.7,
        "bias": torch.randn(L, S),
        "alibi_slopes": torch.rand(H),
        "q_lengths": torch.tensor([L, 2]),
        "k_lengths": torch.tensor([S, 3]),
    }
    return {"query": query, "key": key, "value": value, **{n: t for n, t in everything.items() if n in names}}


@pytest.mark.parametrize("function, name", [(f, name) for f, names in FUNCTIONS for name in names])
def test_subclasses_parameters_and_lists(function: Any, name: str) -> None:
    arguments = arguments_of(function, dict((f, names) for f, names in FUNCTIONS)[function])
    want = function(**arguments)
    Marked.seen.clear()
    got = function(**{**arguments, name: arguments[name].as_subclass(Marked)})
    assert Marked.seen == [function] and torch.equal(got.as_subclass(Tensor), want)
    with pytest.raises(TypeError, match=rf"'{function.__module__}\.{function.__name__}'.*\n?.*Refusing"):
        function(**{**arguments, name: arguments[name].as_subclass(Refusing)})
    parameter = nn.Parameter(arguments[name], requires_grad=False)
    assert torch.equal(function(**{**arguments, name: parameter}), want)
    with pytest.raises(TypeError, match=rf"{name}'? must be (a tensor, got|Tensor, not) list"):
        function(**{**arguments, name: arguments[name].tolist()})
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor"):
        function(**{**arguments, name: arguments[name].to_sparse()})


def test_modes_see_the_function() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    tensors = [t.detach() for t in qkv(dtype=torch.float32)]
    want = fastgru.scaled_dot_product_attention(*tensors)
    with Mode():
        assert torch.equal(fastgru.scaled_dot_product_attention(*tensors), want)
    assert fastgru.scaled_dot_product_attention in seen


def test_compiled_with_a_mode_and_a_causal_bias(backend: str) -> None:
    torch._dynamo.reset()
    tensors = [t.detach() for t in qkv(dtype=torch.float32)]

    def function(*tensors: Tensor) -> Tensor:
        output = fastgru.flash_attention(*tensors, window=(2**63 - 1, 2), scale=0.5)
        return output + fastgru.scaled_dot_product_attention(*tensors, is_causal=True, dropout_p=0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = function(*tensors)
    torch.testing.assert_close(compiled(*tensors), want)
    with torch.device("cpu"):
        torch.testing.assert_close(compiled(*tensors), want)
    mask = causal_lower_right(L, S)
    compiled = torch.compile(lambda *t: fastgru.scaled_dot_product_attention(*t, mask), backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), fastgru.scaled_dot_product_attention(*tensors, mask))


@pytest.mark.parametrize("grad", [True, False])
def test_modules_compile_with_gradients_and_without(grad: bool) -> None:
    torch._dynamo.reset()
    attention = modules(torch.float32, batch_first=True)[1]
    decoder = fastgru.AttentionDecoder(11, 4, 6, True, score="additive")
    memory = torch.randn(B, S, E)
    with torch.set_grad_enabled(grad):
        for module, arguments in (
            (attention, (torch.randn(B, L, E), memory, memory, torch.rand(B, S) < 0.3)),
            (decoder, (torch.randint(11, (B, L)), None, memory, torch.tensor([S, 2]))),
        ):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(*arguments), module(*arguments))


def test_modules_take_subclasses(backend: str) -> None:
    theirs, ours = modules(batch_first=True)
    x, memory = (torch.randn(B, length, E, dtype=torch.float64) for length in (L, S))
    want = theirs(x, memory, memory)
    marked = x.as_subclass(Marked), memory.as_subclass(Marked)
    for q, k in ((marked[0], memory), (x, marked[1]), marked):
        got = ours(q, k, k)
        torch.testing.assert_close([t.as_subclass(Tensor) for t in got], list(want))


def test_flash_attn_says_what_is_not_a_tensor() -> None:
    q = torch.randn(B, L, H, D)
    cu = torch.tensor([0, L], dtype=torch.int32)
    for function, message in (
        (lambda: flash_attn.flash_attn_func(q, [1], q), "k must be a tensor, got list"),
        (lambda: flash_attn.flash_attn_qkvpacked_func([1]), "qkv must be a tensor, got list"),
        (
            lambda: flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], [0, L], cu, L, L),
            "cu_seqlens_q must be a tensor",
        ),
        (lambda: flash_attn.flash_attn_with_kvcache(q, None, q), "k_cache must be a tensor, got NoneType"),
        (lambda: flash_attn.flash_attn_with_kvcache(q, q, q, block_table=[[1]]), "block_table must be a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            function()


# ---- what is hidden from the projections ----

HIDING = {
    "bool padding": {"key_padding_mask": True},
    "float padding": {"key_padding_mask": False},
    "bool column": {"attn_mask": True},
    "float column": {"attn_mask": False},
    "bool column of heads": {"attn_mask": True, "heads": True},
    "float column of heads": {"attn_mask": False, "heads": True},
    "both": {"attn_mask": False, "key_padding_mask": False},
    "causal": {"causal": True},
}


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("same", ["key is value", "key alone", "value alone", "query is key"])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("how", HIDING)
def test_a_source_position_that_no_query_sees(how: str, need_weights: bool, extra: bool, same: str, bad: float) -> None:
    if how == "causal" and (extra or need_weights or same == "query is key"):
        pytest.skip("the hint is for attention without weights; nothing is hidden with as many queries as keys")
    module = modules(batch_first=True, add_bias_kv=extra, add_zero_attn=extra)[1]
    options, lengths = HIDING[how], (S, S) if same == "query is key" else (L, S)
    # What only the padding hides, only the mask, and only both.
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[:, 5:] = True
    masks: dict[str, Any] = {}
    if "key_padding_mask" in options:
        masks["key_padding_mask"] = hidden if how != "both" else hidden & (torch.arange(S) == 5)
    if "attn_mask" in options:
        column = hidden[0] if how != "both" else hidden[0] & (torch.arange(S) == 6)
        masks["attn_mask"] = column.expand(*([2 * B] if "heads" in options else []), *lengths)
    for name, mask in masks.items():
        if options[name] is False:
            masks[name] = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
    if how == "causal":
        masks = {"is_causal": True, "attn_mask": torch.ones(lengths, dtype=torch.bool).triu(1)}
    x, key, value = (torch.randn(B, length, E, dtype=torch.float64) for length in (lengths[0], S, S))
    results = []
    for fill in (0.5, bad):
        dirty = [t.masked_fill(hidden.unsqueeze(-1), fill) for t in (key, value)]
        k, v = {
            "key is value": [dirty[0]] * 2,
            "key alone": (dirty[0], value),
            "value alone": (key, dirty[1]),
            "query is key": (x, dirty[1]),
        }[same]
        output = module(x, k, v, need_weights=need_weights, **masks)[0]
        results.append([output, *torch.autograd.grad(output.sin().sum(), list(module.parameters()))])
    torch.testing.assert_close(results[1], results[0])


# ---- numbers ----


@pytest.mark.parametrize("function", [fastgru.flash_attention, fastgru.scaled_dot_product_attention])
@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("grad", [True, False])
def test_numbers_of_the_wrong_kind(backend: str, function: Any, name: str, grad: bool) -> None:
    if name == "softcap" and function is not fastgru.flash_attention:
        pytest.skip("torch's function has none")
    tensors = [t.detach().requires_grad_(grad) for t in qkv(dtype=torch.float32)]
    learnt = torch.tensor(0.5, requires_grad=True)
    for wrong, message in (
        (learnt, "got a tensor that requires a gradient"),
        (learnt[None], "got a tensor that requires a gradient"),
        ("0.5", "got str"),
        ([0.5], "got list"),
        (torch.ones(2), r"got a tensor of shape \[2\]"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a number, {message}"):
            function(*tensors, **{name: wrong})
    if name == "dropout_p":
        return
    want = function(*tensors, **{name: 0.5})
    for right in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        assert torch.equal(function(*tensors, **{name: right}), want)
    with torch.no_grad():
        assert torch.equal(function(*tensors, **{name: learnt}), want)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(TypeError, match="requires a gradient"):
            function(*tensors, **{name: dual})


def test_more_numbers_of_the_wrong_kind(backend: str) -> None:
    tensors = qkv()
    run = fastgru.flash_attention
    with pytest.raises(TypeError, match="alibi_slopes has no gradient"):
        run(*tensors, alibi_slopes=torch.rand(H, requires_grad=True))
    with torch.no_grad():
        run(*tensors, alibi_slopes=torch.rand(H, requires_grad=True))
    for wrong in (NAN, float("inf"), -1.0):
        with pytest.raises(ValueError, match="softcap must be finite and not negative"):
            run(*tensors, softcap=wrong)
    with pytest.raises(ValueError, match=r"k_lengths must be integers, got torch\.float32"):
        run(*tensors, k_lengths=torch.ones(B, requires_grad=True))


@pytest.mark.parametrize("true", [1, np.True_, torch.tensor(True)], ids=repr)
def test_any_truth_is_causal(backend: str, true: Any) -> None:
    tensors = [t.detach() for t in qkv(dtype=torch.float32)]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            tensors = [t.requires_grad_(grad) for t in tensors]
            want = fastgru.scaled_dot_product_attention(*tensors, is_causal=True)
            assert torch.equal(fastgru.scaled_dot_product_attention(*tensors, is_causal=true), want)
            got = fastgru.flash_attention(*tensors, causal=true, causal_align="top_left")
            assert torch.equal(got, want)


FAR = [2**30, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, np.int64(2**63 - 1), np.uint64(2**64 - 1)]


@pytest.mark.parametrize("far", FAR, ids=repr)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 3)], ids=str)
def test_windows_saturate(backend: str, lengths: tuple[int, int], causal: bool, far: Any) -> None:
    tensors = qkv(B, H, *lengths)
    run = fastgru.flash_attention
    for window, same in (((far, far), (-1, -1)), ((far, 1), (-1, 1)), ((1, far), (1, -1))):
        want = with_gradients(run, tensors, window=same, causal=causal)
        got = with_gradients(run, tensors, window=window, causal=causal)
        torch.testing.assert_close(got, want)
        heads_last = [t.transpose(1, 2) for t in tensors]
        got = flash_attn.flash_attn_func(*heads_last, window_size=window, causal=causal)
        torch.testing.assert_close(got.transpose(1, 2), want[0])
        with torch.no_grad():
            cached = flash_attn.flash_attn_with_kvcache(*heads_last, window_size=window, causal=causal)
        torch.testing.assert_close(cached.transpose(1, 2), want[0])


@pytest.mark.parametrize(
    "wrong",
    [
        (-2, 0),
        (-(2**63), 0),
        (0, -(2**70)),
        (True, 1),
        (1.0, 1),
        (np.float32(1), 1),
        ("1", 1),
        (1,),
        (1, 2, 3),
        4,
        None,
    ],
    ids=repr,
)
def test_windows_that_are_none(backend: str, wrong: Any) -> None:
    tensors = qkv()
    with pytest.raises(ValueError, match="window must be two whole numbers of keys, or -1 for no bound, got"):
        fastgru.flash_attention(*tensors, window=wrong)
    with pytest.raises(ValueError, match="window must be two whole numbers"):
        flash_attn.flash_attn_func(*(t.transpose(1, 2) for t in tensors), window_size=wrong)


@pytest.mark.parametrize(
    "window", [[2, 1], np.array([2, 1]), torch.tensor([2, 1]), (np.int32(2), torch.tensor(1))], ids=repr
)
def test_windows_of_other_types(backend: str, window: Any) -> None:
    tensors = qkv()
    want = fastgru.flash_attention(*tensors, window=(2, 1))
    assert torch.equal(fastgru.flash_attention(*tensors, window=window), want)


# ---- the backend asked for ----


def test_additive_attention_asks_the_registry() -> None:
    tensors = list(arguments_of(fastgru.additive_attention, [])[name] for name in ("query", "key", "value", "weight"))
    decoder = fastgru.AttentionDecoder(11, 4, 6, True, score="additive")
    fed = torch.randint(11, (B, L)), None, torch.randn(B, S, 6)
    with fastgru.use_backend("reference"):
        want = fastgru.additive_attention(*tensors)
    assert torch.equal(fastgru.additive_attention(*tensors), want)
    if "cpu: chosen" not in fastgru.explain():
        pytest.skip("only the reference is there")
    message = r"'cpu' has no additive attention, only 'reference' has; use_backend\('auto'\)"
    with fastgru.use_backend("cpu"):
        with pytest.raises(fastgru.BackendUnavailable, match=message):
            fastgru.additive_attention(*tensors)
        with pytest.raises(fastgru.BackendUnavailable, match=message):
            decoder(*fed)


# ---- nested tensors ----

SEQUENCES = (5, 3, 0, 1)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_nested_multihead_attention(backend: str, layout: torch.layout, need_weights: bool, train: bool) -> None:
    theirs, ours = modules(torch.float32, batch_first=True)
    parts = [torch.randn(n, E) for n in SEQUENCES]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=train)
    ours.train(train)
    output, weights = ours(x, x, x, need_weights=need_weights)
    assert output.is_nested and output.layout is layout
    for i, part in enumerate(parts):
        want, its_weights = theirs(part, part, part)
        torch.testing.assert_close(output.unbind()[i], want)
        if weights is not None:
            torch.testing.assert_close(weights[i, : len(part), : len(part)], its_weights)
    if layout is torch.jagged:
        x + output  # on the same offsets
    elif not train:
        with torch.no_grad():
            theirs.eval()
            want, its_weights = theirs(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(weights, its_weights)
    if train:
        parameters = list(ours.parameters())
        got = torch.autograd.grad(sum(t.sin().sum() for t in output.unbind()), parameters)
        wanted = torch.autograd.grad(sum(theirs(t, t, t)[0].sin().sum() for t in parts), list(theirs.parameters()))
        torch.testing.assert_close(got, wanted)
    parts = [torch.randn(n, E) for n in (2, 4, 3, 1)]
    memory = torch.nested.nested_tensor(parts, layout=layout)
    crossed = ours(x, memory, memory, need_weights=need_weights)[0]
    for mine, query, part in zip(crossed.unbind(), x.unbind(), parts, strict=True):
        torch.testing.assert_close(mine, theirs(query, part, part)[0])


def test_nested_multihead_attention_refuses_in_one_line() -> None:
    module = modules(torch.float32, batch_first=True)[1]
    x, y = (torch.nested.nested_tensor([torch.randn(n, E) for n in lengths]) for lengths in ((3, 2), (2, 2)))
    dense = torch.randn(2, 3, E)
    for call in (
        lambda: module(x, x, x, attn_mask=torch.zeros(3, 3)),
        lambda: module(x, x, x, key_padding_mask=torch.zeros(2, 3)),
        lambda: module(x, x, x, is_causal=True),
        lambda: module(dense, x, x),
        lambda: module(x, dense, dense),
        lambda: modules(torch.float32)[1](x, x, x),
    ):
        with pytest.raises(AssertionError, match="MultiheadAttention takes nested tensors as query, key and value tog"):
            call()
    with pytest.raises(AssertionError, match="of the same lengths"):
        module(x, x, y)
    for function in (fastgru.flash_attention, fastgru.additive_attention):
        with pytest.raises(TypeError, match="query must be a dense tensor, got a nested one"):
            function(x, x, x, *([x] if function is fastgru.additive_attention else []))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_converted_encoder_with_padding_and_a_hook(backend: str, layers: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, layers).eval()
    source, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        want = model(source, src_key_padding_mask=padding)
        fastgru.convert(model)
        torch.testing.assert_close(model(source, src_key_padding_mask=padding), want)
        calls: list[Any] = []
        for module in model.layers:
            module.linear1.register_forward_hook(lambda *args: calls.append(args))
        torch.testing.assert_close(model(source, src_key_padding_mask=padding), want)
    assert len(calls) == layers


def test_a_converted_layer_whose_row_sees_nothing() -> None:
    layer = fastgru.convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    source, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        # What docs/attention.md says of torch's kernel for the whole layer.
        assert layer(source, src_key_padding_mask=padding)[1].isnan().all()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert layer(source, src_key_padding_mask=padding).isfinite().all()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        layer.norm1.register_forward_hook(lambda *args: None)
        assert layer(source, src_key_padding_mask=padding).isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_sdpa(backend: str, layout: torch.layout, rank: int, causal: bool) -> None:
    def nested(*lengths: int) -> tuple[Tensor, list[Tensor]]:
        heads_last = [torch.randn(n, *([2] if rank == 4 else []), 4) for n in lengths]
        if layout is torch.jagged:
            t = torch.nested.nested_tensor(heads_last, layout=layout, requires_grad=True)
            return (t.transpose(1, 2) if rank == 4 else t), [p.movedim(0, -2) for p in heads_last]
        heads_first = [p.movedim(0, -2).contiguous() for p in heads_last]
        return torch.nested.nested_tensor(heads_first, requires_grad=True), heads_first

    (q, qs), (k, ks), (v, vs) = nested(5, 3, 1), nested(2, 4, 6), nested(2, 4, 6)
    output = fastgru.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    assert output.is_nested and output.layout is layout
    for got, *parts in zip(output.unbind(), qs, ks, vs, strict=True):
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*parts, is_causal=causal, scale=0.3))
    if layout is torch.jagged:
        q + output
    if not causal and layout is torch.strided:
        torch.testing.assert_close(
            list(output.unbind()), list(F.scaled_dot_product_attention(q, k, v, scale=0.3).unbind())
        )
    with pytest.raises(RuntimeError, match="must all be nested tensors or none, and nested ones take no attn_mask"):
        fastgru.scaled_dot_product_attention(q, k, vs[0])
    with pytest.raises(RuntimeError, match="must all be nested tensors or none"):
        fastgru.scaled_dot_product_attention(q, k, v, torch.zeros(5, 6))
    with pytest.raises(RuntimeError, match="key and value of the same lengths"):
        fastgru.scaled_dot_product_attention(q, k, nested(3, 4, 6)[0])


# ---- what is kept for the backward pass ----


def overwritten(
    module: nn.Module, free: set[str], target: str, kind: str, mask: str, need_weights: bool, batched: bool
) -> Any:
    """The gradients of a forward pass, of which ``target`` is overwritten before the backward pass; None: it raises."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("parameters" in free or name in free)
    lead = (3,) if batched else ()
    shape = (*lead, L, E) if not batched or module.batch_first else (L, *lead, E)
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_("input" in free) for _ in range(2)]
    query, other = (leaf * 1 for leaf in leaves)
    key, value = {"self": (query, query), "cross": (other, other), "key": (query, other)}[kind]
    masks: dict[str, Tensor] = {}
    if mask:
        shape = (*lead, L) if mask.startswith("key") else (L, L)
        name, dtype = mask.split()
        masks[name] = torch.zeros(shape, dtype=torch.bool if dtype == "bool" else torch.float64)
    output, weights = module(query, key, value, need_weights=need_weights, **masks)
    loss = output.sin().sum() if target != "output" else output.sum()
    named = {"query": query, "key": key, "value": value, "output": output, "weights": weights}
    overwrite = named.get(target, next(iter(masks.values()), None))
    if overwrite is not None:
        with torch.no_grad():
            overwrite.logical_not_() if overwrite.dtype is torch.bool else overwrite.mul_(1.5)
    wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    try:
        return torch.autograd.grad(loss, wanted, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "mask", ["", "key_padding_mask bool", "key_padding_mask float", "attn_mask bool", "attn_mask float"]
)
def test_nothing_is_kept_that_torch_does_not_keep(
    mask: str, need_weights: bool, batch_first: bool, batched: bool
) -> None:
    pair = modules(batch_first=batch_first)
    subsets = ({"input", "parameters"}, {"parameters"}, {"input"}, {"in_proj_weight"}, {"out_proj.weight", "input"})
    for free, kind, target in itertools.product(
        subsets, ("self", "cross", "key"), ("query", "key", "value", "mask", "output", "weights")
    ):
        if (target == "mask" and not mask) or (target == "weights" and not need_weights):
            continue
        theirs, ours = (
            overwritten(copy.deepcopy(module), free, target, kind, mask, need_weights, batched) for module in pair
        )
        if theirs is not None:
            assert ours is not None, (free, kind, target)
            torch.testing.assert_close(ours, theirs, msg=lambda m: f"{free}, {kind}, {target}: {m}")  # noqa: B023


def test_a_residual_added_in_place() -> None:
    results = []
    for module in modules(batch_first=True):
        x = torch.linspace(-1, 1, B * L * E, dtype=torch.float64).view(B, L, E).requires_grad_()
        y = x * 2
        y += module(y, y, y)[0]
        y.masked_fill_(torch.arange(L).unsqueeze(-1) > 3, 0)
        results.append(torch.autograd.grad(y.sin().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(results[1], results[0])


# ---- sizes of 0 ----

SIZES = [(2, 0, 3, 4, 5), (2, 2, 3, 4, 0), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (0, 2, 3, 4, 5), (2, 2, 0, 0, 5), (0,) * 5]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}, {"mask": bool}, {"mask": float}], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sdpa_of_nothing(backend: str, dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    options = dict(options)
    kind = options.pop("mask", None)
    if kind is not None:
        mask = torch.ones(sizes[2:4], dtype=torch.bool)
        options["attn_mask"] = mask if kind is bool else torch.zeros(sizes[2:4], dtype=dtype)
    for columns in (sizes[4], 3):
        tensors = qkv(*sizes, dtype=dtype)
        tensors[2] = torch.randn(*sizes[:2], sizes[3], columns, dtype=dtype).requires_grad_()
        want = with_gradients(F.scaled_dot_product_attention, tensors, **options)
        torch.testing.assert_close(with_gradients(fastgru.scaled_dot_product_attention, tensors, **options), want)
        with torch.no_grad():
            torch.testing.assert_close(fastgru.scaled_dot_product_attention(*tensors, **options), want[0])


@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_option_of_nothing(backend: str, sizes: tuple[int, ...], columns: int) -> None:
    tensors = qkv(*sizes)
    tensors[2] = torch.randn(*sizes[:2], sizes[3], columns, dtype=torch.float64).requires_grad_()
    batch, heads = sizes[:2]
    output, lse = fastgru.flash_attention(
        *tensors,
        bias=torch.zeros(sizes[2:4], dtype=torch.float64, requires_grad=True),
        dropout_p=0.3,
        causal=True,
        window=(2, 2),
        softcap=2.0,
        alibi_slopes=torch.rand(heads),
        q_lengths=torch.full((batch,), sizes[2]),
        k_lengths=torch.full((batch,), sizes[3]),
        return_lse=True,
    )
    assert output.shape == (*sizes[:3], columns) and lse.shape == sizes[:3]
    grads = torch.autograd.grad(output.sum() + lse.masked_fill(lse.isinf(), 0).sum(), tensors, create_graph=True)
    assert [g.shape for g in grads] == [t.shape for t in tensors] and not any(g.isnan().any() for g in grads)
    # Nothing, or what torch.func sees of it.
    torch.func.jvp(fastgru.flash_attention, tuple(tensors), tuple(tensors))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_multihead_attention_of_nothing(backend: str, sizes: tuple[int, int, int], need_weights: bool) -> None:
    batch, queries, keys = sizes
    results = []
    for options in ({}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        for module in modules(batch_first=True, **options):
            x, memory = (torch.ones(batch, n, E, dtype=torch.float64, requires_grad=True) for n in (queries, keys))
            output, weights = module(x, memory, memory, need_weights=need_weights)
            leaves = [x, memory, *module.parameters()]
            results.append((output, weights, torch.autograd.grad(output.sum(), leaves)))
        torch.testing.assert_close(results.pop(), results.pop())


# ---- the decoder ----


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_source_lengths_of_any_integers(score: str, batch_first: bool) -> None:
    decoder = fastgru.AttentionDecoder(11, 4, 6, batch_first, score=score)
    tokens, memory = torch.randint(11, (B, L)), torch.randn(B, S, 6)
    fed = (tokens, None, memory) if batch_first else (tokens.t(), None, memory.transpose(0, 1))
    want = decoder(*fed, torch.tensor([S, 2]))[0]
    kinds = [torch.tensor([S, 2], dtype=d) for d in (torch.int16, torch.int32, torch.uint8, torch.int8)]
    for lengths in ([S, 2], (S, 2), np.array([S, 2]), [torch.tensor(S), torch.tensor(2)], *kinds):
        assert torch.equal(decoder(*fed, lengths)[0], want)
        states = torch.randn(B, L, 6)
        got = decoder.attend(states, memory, lengths)
        assert torch.equal(got, decoder.attend(states, memory, torch.tensor([S, 2])))
    seen = torch.arange(S) < torch.tensor([[S], [2]])
    for wrong in (seen, seen[0, :B], seen.float(), [S], [1.0, 2.0], torch.tensor([S, 2, 1])):
        with pytest.raises(ValueError, match=r"source_lengths must be \[B\] = \[2\] integers, how many positions"):
            decoder(*fed, wrong)
    with pytest.raises(RuntimeError, match=r"k_lengths must lie in \[0, 7\]"):
        decoder(*fed, [S + 1, S + 1])


@pytest.mark.parametrize("lengths", [None, [0, 0]])
@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_a_source_of_no_positions(score: str, lengths: list[int] | None) -> None:
    decoder = fastgru.AttentionDecoder(11, 4, 6, True, score=score)
    logits, _ = decoder(torch.randint(11, (B, L)), None, torch.randn(B, 0, 6), lengths)
    grads = torch.autograd.grad(logits.sum(), list(decoder.parameters()), materialize_grads=True)
    assert logits.shape == (B, 11) and not any(t.isnan().any() for t in (logits, *grads))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_a_traced_decoder(score: str, grad: bool) -> None:
    decoder = fastgru.AttentionDecoder(11, 4, 6, True, score=score)

    def arguments(batch: int, steps: int, source: int) -> tuple[Tensor, ...]:
        tokens, hidden = torch.randint(11, (batch, steps)), torch.randn(1, batch, 6)
        return tokens, hidden, torch.randn(batch, source, 6), torch.randint(source + 1, (batch,))

    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(decoder, arguments(B, L, S))  # looks at it with and without gradients
    for sizes in ((B, L, S), (4, 3, 9)):
        fed = arguments(*sizes)
        torch.testing.assert_close(traced(*fed), decoder(*fed))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_traced_multihead_attention(padded: bool, need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = modules(torch.float32, batch_first=True)[1]

        def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
            mask = padding if padded else None
            result: Tensor = self.attention(x, memory, memory, mask, need_weights=need_weights)[0]
            return result

    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (torch.randn(B, L, E), torch.randn(B, S, E), torch.zeros(B, S).bool()))
    fed = torch.randn(4, 3, E), torch.randn(4, 9, E), torch.rand(4, 9) < 0.5
    torch.testing.assert_close(traced(*fed), model(*fed))


# ---- errors ----

X, Y = torch.randn(3, 5, E), torch.randn(3, 7, E)
ERRORS: dict[str, Callable[[nn.Module], Any]] = {
    "rank of query": lambda m: m(X[None], X[None], X[None]),
    "vector": lambda m: m(X[0, 0], X[0, 0], X[0, 0]),
    "batched query": lambda m: m(X, X[0], X[0]),
    "unbatched query": lambda m: m(X[0], X, X),
    "length of value": lambda m: m(X, Y, Y[:, 1:]),
    "columns of query": lambda m: m(X[..., :4], X[..., :4], X[..., :4]),
    "columns of key": lambda m: m(X, X[..., :4], X[..., :4]),
    "hint without mask": lambda m: m(X, X, X, is_causal=True),
    "2-D mask": lambda m: m(X, X, X, attn_mask=torch.ones(5, 4)),
    "3-D mask": lambda m: m(X, X, X, attn_mask=torch.ones(5, 5, 5)),
    "4-D mask": lambda m: m(X, X, X, attn_mask=torch.ones(1, 6, 5, 5)),
    "3-D mask, unbatched": lambda m: m(X[0], X[0], X[0], attn_mask=torch.ones(3, 5, 5)),
    "1-D mask, unbatched": lambda m: m(X[0], X[0], X[0], attn_mask=torch.ones(5)),
    "batch of padding": lambda m: m(X, X, X, key_padding_mask=torch.ones(5, 3)),
    "length of padding": lambda m: m(X, X, X, key_padding_mask=torch.ones(3, 4)),
    "1-D padding": lambda m: m(X, X, X, key_padding_mask=torch.ones(5)),
    "2-D padding, unbatched": lambda m: m(X[0], X[0], X[0], key_padding_mask=torch.ones(1, 5)),
    "length of padding, unbatched": lambda m: m(X[0], X[0], X[0], key_padding_mask=torch.ones(4)),
    "integers as padding": lambda m: m(X, X, X, key_padding_mask=torch.ones(3, 5).long()),
    "integers as mask": lambda m: m(X, X, X, attn_mask=torch.ones(5, 5).long()),
}
WORDS_OF_THEIR_OWN: dict[str, Callable[[nn.Module], Any]] = {
    "batch of key": lambda m: m(X, X[1:], X[1:]),
    "dtype": lambda m: m(X.double(), X.double(), X.double()),
    "list": lambda m: m([1], X, X),
    "none": lambda m: m(X, None, None),
    "list as mask": lambda m: m(X, X, X, attn_mask=[1]),
    "list as padding": lambda m: m(X, X, X, key_padding_mask=[1]),
}


def raised(function: Callable[..., Any], argument: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(argument)
    return caught.value


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", [*ERRORS, *WORDS_OF_THEIR_OWN])
def test_errors_of_multihead_attention_are_torchs(name: str, need_weights: bool) -> None:
    function = {**ERRORS, **WORDS_OF_THEIR_OWN}[name]
    # Time first, so that sizes in the words are those that torch's functions see.
    theirs, ours = (raised(function, module) for module in modules(torch.float32, batch_first=True))
    assert isinstance(ours, type(theirs))
    if name in ERRORS and name != "length of value":
        assert str(ours) == str(theirs)


def test_errors_of_other_columns_are_torchs() -> None:
    k, v = torch.randn(3, 7, 5), torch.randn(3, 7, 4)
    for key, value in ((v, v), (k, k), (k[:, 1:], v)):
        theirs, ours = (
            raised(lambda m: m(X, key, value), module)  # noqa: B023
            for module in modules(torch.float32, batch_first=True, kdim=5, vdim=4)
        )
        assert type(ours) is type(theirs) is AssertionError
        assert str(ours).split("torch.Size")[0] == str(theirs).split("torch.Size")[0]


q, k = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 7, 4)
SDPA_ERRORS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "both": (
        "Explicit attn_mask should not be set when is_causal=True",
        lambda f: f(q, k, k, torch.ones(5, 7), 0.0, True),
    ),
    "dtype": (
        "Expected query, key, and value to have the same dtype, but got query.dtype: ",
        lambda f: f(q, k.double(), k),
    ),
    "device": ("Expected query, key, and value to have the same device type, but got", lambda f: f(q, k.to("meta"), k)),
    "rank": ("2 dimensional, but got query.dim: 1 key.dim: 4 and value.dim: 4 instead.", lambda f: f(q[0, 0, 0], k, k)),
    "mask": ("Expected attn_mask dtype to be bool or float or to match", lambda f: f(q, k, k, torch.ones(5, 7).int())),
    "dropout": ("dropout probability has to be between 0 and 1, but got 1.5", lambda f: f(q, k, k, None, 1.5)),
    "list": ("argument 'query'", lambda f: f([1], k, k)),
    "list as mask": ("argument 'attn_mask'", lambda f: f(q, k, k, [1])),
    "columns": ("", lambda f: f(q[..., :3], k, k)),
    "heads": ("", lambda f: f(q, k[:, :2], k[:, :2])),
    "heads of groups": ("", lambda f: f(q, k[:, :2], k[:, :2], enable_gqa=True)),
    "shape of the mask": ("", lambda f: f(q, k, k, torch.ones(5, 6).bool())),
    "shape of the mask in 5-D": ("", lambda f: f(q[None], k[None], k[None], torch.ones(5, 6).bool())),
    "scale": ("scale", lambda f: f(q, k, k, scale="1")),
}


@pytest.mark.parametrize("name", SDPA_ERRORS)
def test_errors_of_sdpa_are_torchs(backend: str, name: str) -> None:
    words, function = SDPA_ERRORS[name]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = raised(function, F.scaled_dot_product_attention)
    ours = raised(function, fastgru.scaled_dot_product_attention)
    assert words in str(theirs).replace("  ", " ") and words in str(ours)
    assert isinstance(ours, type(theirs)) and not isinstance(ours, NotImplementedError)


def test_errors_do_not_begin_with_a_place_in_the_source(backend: str) -> None:
    for grad in (True, False):
        tensors = [t.detach().requires_grad_(grad) for t in qkv()]
        error = raised(lambda t: fastgru.flash_attention(*t, k_lengths=torch.tensor([1, 9])), tensors)
        assert str(error) == "k_lengths must lie in [0, 7], got 9" and isinstance(error, RuntimeError)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["", "bool", "float"])
@pytest.mark.parametrize("how", ["padding", "mask"])
@pytest.mark.parametrize("extra", [False, True])
def test_dtypes_under_autocast(
    backend: str, extra: bool, how: str, mask: str, autocast: torch.dtype, dtype: torch.dtype
) -> None:
    pair = modules(dtype, batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    x = torch.randn(B, L, E, dtype=dtype)
    options: dict[str, Any] = {}
    if mask:
        shape = (B, L) if how == "padding" else (L, L)
        name = "key_padding_mask" if how == "padding" else "attn_mask"
        options[name] = torch.zeros(shape, dtype=torch.bool if mask == "bool" else dtype)
    for train, need_weights in itertools.product((True, False), repeat=2):
        results = []
        for module in pair:
            module.train(train)
            with torch.autocast("cpu", autocast):
                try:
                    results.append(
                        [None if t is None else t.dtype for t in module(x, x, x, need_weights=need_weights, **options)]
                    )
                except (RuntimeError, TypeError):
                    results.append([])  # torch has no float64 and masks under autocast
        assert not results[0] or results[0] == results[1]


def test_float64_stays_under_autocast(backend: str) -> None:
    tensors = qkv()
    want = fastgru.scaled_dot_product_attention(*tensors)
    additive = [torch.randn(s, dtype=torch.float64) for s in ((B, L, D), (B, S, D), (B, S, 3), (D,))]
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*tensors).dtype is torch.float64
        torch.testing.assert_close(fastgru.scaled_dot_product_attention(*tensors), want)
        if backend == "reference":
            assert fastgru.additive_attention(*additive).dtype is torch.float64
