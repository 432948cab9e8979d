"""MultiheadAttention against torch's; additive attention and AttentionDecoder against their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastgru
from fastgru.testing import pairwise

FACTORS: dict[str, list[Any]] = {
    "batch_first": [False, True],
    "kdim": [None, 5],
    "vdim": [None, 6],
    "bias": [False, True],
    "add_bias_kv": [False, True],
    "add_zero_attn": [False, True],
    "padding": ["", "bool", "float"],
    "mask": ["", "bool", "float", "bool 3-D", "float 3-D"],
    "need_weights": [False, True],
    "average": [False, True],
    "unbatched": [False, True],
    "train": [False, True],
}
CONSTRUCTOR = ("batch_first", "kdim", "vdim", "bias", "add_bias_kv", "add_zero_attn")
B, L, S, E, H = 3, 5, 7, 8, 2


def pair(**options: Any) -> tuple[nn.MultiheadAttention, fastgru.MultiheadAttention]:
    theirs, ours = nn.MultiheadAttention(E, H, **options), fastgru.MultiheadAttention(E, H, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=lambda case: "-".join(map(str, case.values())))
def test_like_torch(backend: str, case: dict[str, Any]) -> None:
    # In float64: the numbers are the business of test_attention_parity.py.
    dtype = torch.float64
    modules = pair(**{name: case[name] for name in CONSTRUCTOR}, dtype=dtype)
    lead = [B] if not case["unbatched"] else []
    inputs = [
        torch.randn(*lead, length, size or E, dtype=dtype)
        for length, size in ((L, None), (S, case["kdim"]), (S, case["vdim"]))
    ]
    if lead and not case["batch_first"]:
        inputs = [t.transpose(0, 1) for t in inputs]
    options: dict[str, Any] = {"need_weights": case["need_weights"], "average_attn_weights": case["average"]}
    if case["padding"]:
        padding = torch.rand(*lead, S) < 0.3
        padding[..., 0] = False
        options["key_padding_mask"] = padding if case["padding"] == "bool" else torch.randn(*lead, S, dtype=dtype)
    if case["mask"]:
        shape = (H * (B if lead else 1), L, S) if "3-D" in case["mask"] else (L, S)
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False
        options["attn_mask"] = mask if "bool" in case["mask"] else torch.randn(shape, dtype=dtype)
        if (case["padding"] == "bool") != ("bool" in case["mask"]) and case["padding"]:
            # torch warns of masks of two kinds.
            options["attn_mask"] = torch.zeros(shape, dtype=dtype).masked_fill(mask, -torch.inf)
            options["key_padding_mask"] = torch.randn(*lead, S, dtype=dtype)
    results = []
    for module in modules:
        module.train(case["train"])
        leaves = [t.clone().requires_grad_() for t in inputs]
        output, weights = module(*leaves, **options)
        grads = torch.autograd.grad(output.sin().sum(), [*leaves, *module.parameters()])
        results.append((output, weights, grads))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_and_the_causal_hint(backend: str, causal: bool) -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, L, E)
    options: dict[str, Any] = {"need_weights": False}
    if causal:
        options |= {"is_causal": True, "attn_mask": nn.Transformer.generate_square_subsequent_mask(L)}
    torch.testing.assert_close(ours(x, x, x, **options), theirs(x, x, x, **options))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_sequence_that_is_all_padding(backend: str, need_weights: bool) -> None:
    _, module = pair(batch_first=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    padding[0, 4:] = True
    x, memory = torch.randn(B, L, E, requires_grad=True), torch.randn(B, S, E)
    dirty = memory.masked_fill(padding.unsqueeze(-1), torch.nan)
    outputs = [module(x, m, m, padding, need_weights=need_weights) for m in (memory, dirty)]
    torch.testing.assert_close(outputs[0], outputs[1])
    output, weights = outputs[0]
    torch.testing.assert_close(output[1], module.out_proj.bias.expand(L, E))
    assert weights is None or not weights[1].any()
    leaves = [x, *module.parameters()]
    grads = [torch.autograd.grad(o.sin().sum(), leaves) for o, _ in outputs]
    assert not grads[0][0][1].any()
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training_only(backend: str, need_weights: bool) -> None:
    module = fastgru.MultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(L, B, E)
    runs = [module(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.equal(*runs)
    module.eval()
    runs = [module(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_compiles(backend: str) -> None:
    torch._dynamo.reset()
    _, module = pair(batch_first=True)
    x, padding = torch.randn(B, L, E), torch.rand(B, L) < 0.3
    for need_weights in (False, True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(x, x, x, padding, need_weights=need_weights), module(x, x, x, padding, need_weights=need_weights)
        )


def test_inside_torchs_transformer_layer(backend: str) -> None:
    theirs = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    ours = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    ours.self_attn = fastgru.MultiheadAttention(E, H, batch_first=True)
    ours.multihead_attn = fastgru.MultiheadAttention(E, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    torch.testing.assert_close(ours(x, memory, mask), theirs(x, memory, mask))


def test_errors_of_multihead_attention() -> None:
    _, module = pair(batch_first=True)
    x = torch.randn(B, L, E)
    with pytest.raises(RuntimeError, match="one batch size"):
        module(x, x[1:], x[1:])


# ---- additive attention ----


def additive(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, k_lengths: Tensor | None = None) -> Tensor:
    """The equation."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ weight
    if k_lengths is not None:
        scores = scores.masked_fill(torch.arange(key.size(1)) >= k_lengths.view(-1, 1, 1), -1e30)
    return scores.softmax(-1) @ value


def additive_problem(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((B, L, 4), (B, S, 4), (B, S, 6), (4,))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("piece", [1, 30, 1 << 22])
@pytest.mark.parametrize("lengths", [None, (7, 3, 1)])
def test_additive_attention(monkeypatch: pytest.MonkeyPatch, piece: int, lengths: tuple[int, ...] | None) -> None:
    monkeypatch.setattr("fastgru.ops.additive.reference._PIECE", piece)
    tensors = additive_problem()
    k_lengths = None if lengths is None else torch.tensor(lengths)
    runs = []
    for run in (fastgru.additive_attention, additive):
        output = run(*tensors, k_lengths=k_lengths)
        runs.append((output, torch.autograd.grad(output.sin().sum(), tensors)))
    torch.testing.assert_close(runs[0], runs[1])


def test_additive_attention_derivatives_and_operators() -> None:
    tensors = additive_problem()
    lengths = torch.tensor([7, 3, 0])

    def function(*tensors: Tensor) -> Tensor:
        return fastgru.additive_attention(*tensors, k_lengths=lengths)

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)
    query, key, value, weight = tensors
    torch.library.opcheck(torch.ops.fastgru.reference_additive_forward.default, (query, key, weight, value, lengths))
    output = function(*tensors)
    assert not output[2].any()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors), output)
    dirty = [t.detach().clone().requires_grad_() for t in tensors]
    for t in dirty[1:3]:
        t.data[1, 3:] = torch.nan
    got = function(*dirty)
    assert torch.equal(got, output)
    wanted, dirtied = (torch.autograd.grad(o.sum(), t) for o, t in ((output, tensors), (got, dirty)))
    assert all(torch.equal(a, b) for a, b in zip(wanted, dirtied, strict=True))


def test_additive_attention_never_holds_every_hidden_unit_of_every_score() -> None:
    torch.set_num_threads(1)
    query, key = (torch.randn(1, 600, 32, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)))
            return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgru.ops.additive.reference._PIECE", 1 << 18)
        with Watch():
            output = fastgru.ops.additive.reference.additive(query, key, weight, key, None)
            fastgru.ops.additive.reference.additive_backward(output[0], query, key, weight, key, None, *output)
    assert max(largest) <= 1 << 18


def test_errors_of_additive_attention() -> None:
    query, key, value, weight = (t.detach() for t in additive_problem())
    for arguments, message in (
        ((query[0], key, value, weight), "query must have 3 dimensions"),
        ((query, key[..., :3], value, weight), r"expected query \[B, Lq, H\]"),
        ((query, key.float(), value, weight), "key must have query's dtype and device"),
    ):
        with pytest.raises(ValueError, match=message):
            fastgru.additive_attention(*arguments)
    with pytest.raises(ValueError, match=r"k_lengths must have shape \[B\] = \[3\], got \[1\]"):
        fastgru.additive_attention(query, key, value, weight, k_lengths=torch.tensor([1]))
    with pytest.raises(RuntimeError, match=r"k_lengths must lie in \[0, 7\], got 8"):
        fastgru.additive_attention(query, key, value, weight, k_lengths=torch.tensor([1, 8, 2]))


# ---- the decoder ----


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_decoder(backend: str, score: str, batch_first: bool) -> None:
    if score == "additive":
        fastgru.use_backend("auto")
    encoder_dim = 6 if score == "dot" else 10
    decoder = fastgru.AttentionDecoder(11, 4, 6, batch_first, score=score, encoder_dim=encoder_dim)
    tokens, memory, lengths = torch.randint(11, (B, L)), torch.randn(B, S, encoder_dim), torch.tensor([7, 2, 4])
    hidden = torch.randn(1, B, 6)
    fed = (tokens, hidden, memory) if batch_first else (tokens.t(), hidden, memory.transpose(0, 1))
    logits, new_hidden = decoder(*fed, lengths)

    states, want_hidden = decoder.rnn(decoder.embedding(fed[0]), hidden)
    states = states if batch_first else states.transpose(0, 1)
    rows = []
    for b, t in [(b, L - 1) for b in range(B)] if batch_first else [(B - 1, t) for t in range(L)]:
        h, seen = states[b, t], memory[b, : lengths[b]]
        if score == "additive":
            scores = torch.tanh(decoder.query(h) + decoder.key(seen)) @ decoder.weight
        else:
            scores = (seen if score == "dot" else decoder.key(seen)) @ h
        context = scores.softmax(0) @ seen
        rows.append(decoder.out(torch.tanh(decoder.combine(torch.cat([context, h])))))
    torch.testing.assert_close(logits, torch.stack(rows))
    torch.testing.assert_close(new_hidden, want_hidden)
    grads = torch.autograd.grad(logits.sum(), list(decoder.parameters()))
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_attention_decoder_does_not_read_the_padding(backend: str, score: str) -> None:
    if score == "additive":
        fastgru.use_backend("auto")
    decoder = fastgru.AttentionDecoder(11, 4, 6, True, score=score)
    tokens, memory, lengths = torch.randint(11, (B, L)), torch.randn(B, S, 6), torch.tensor([7, 2, 0])
    dirty = memory.masked_fill((torch.arange(S) >= lengths.unsqueeze(-1)).unsqueeze(-1), torch.nan)
    results = []
    for outputs in (memory, dirty):
        logits, _ = decoder(tokens, None, outputs, lengths)
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), list(decoder.parameters()))])
    torch.testing.assert_close(results[1], results[0])


def test_attention_decoder_extends_the_decoder() -> None:
    plain = fastgru.Decoder(11, 4, 6).state_dict()
    missing = fastgru.AttentionDecoder(11, 4, 6).load_state_dict(plain, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"key.weight", "combine.weight"}


def test_errors_of_attention_decoder() -> None:
    with pytest.raises(ValueError, match="score must be one of dot, general, additive, got 'cosine'"):
        fastgru.AttentionDecoder(11, 4, 6, score="cosine")
    with pytest.raises(ValueError, match="'dot' needs encoder_dim = hidden_dim, got 12 and 6"):
        fastgru.AttentionDecoder(11, 4, 6, score="dot", encoder_dim=12)
    decoder = fastgru.AttentionDecoder(11, 4, 6, True)
    for shape in ((B, S, 5), (B + 1, S, 6), (B, 6)):
        with pytest.raises(ValueError, match=r"encoder_outputs must be \[B, S, encoder_dim\] with B = 3"):
            decoder(torch.zeros(B, L, dtype=torch.long), None, torch.randn(shape))


def test_training_with_attention_learns_to_copy() -> None:
    encoder, decoder = fastgru.Encoder(8, 8, 16, True), fastgru.AttentionDecoder(8, 8, 16, True, score="additive")
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    losses = []
    for _ in range(150):
        tokens = torch.randint(8, (16, 5))
        memory, hidden = encoder(tokens)
        logits, _ = decoder(tokens[:, :1], hidden, memory)
        loss = nn.functional.cross_entropy(logits, tokens[:, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = (sum(part) / 10 for part in (losses[:10], losses[-10:]))
    assert last < 0.5 * first, losses[::10]
