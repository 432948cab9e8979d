"""The Encoder/Decoder pair against the same pair on torch.nn.GRU."""

from __future__ import annotations

import pytest
import torch

import fastgru

PAIRS = [
    pytest.param(fastgru.Encoder, fastgru.ReferenceEncoder, id="encoder"),
    pytest.param(fastgru.Decoder, fastgru.ReferenceDecoder, id="decoder"),
]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize(("ours_class", "theirs_class"), PAIRS)
def test_same_numbers_and_gradients(
    backend: str, ours_class: type, theirs_class: type, with_hidden: bool, batch_first: bool
) -> None:
    torch.manual_seed(1)
    theirs = theirs_class(11, 5, 6, batch_first=batch_first)
    torch.manual_seed(1)
    ours = ours_class(11, 5, 6, batch_first=batch_first)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    tokens = torch.randint(11, (3, 4) if batch_first else (4, 3))
    hidden = torch.randn(1, 3, 6) if with_hidden else None
    results = []
    for module in (ours, theirs):
        output, new_hidden = module(tokens, hidden)
        grads = torch.autograd.grad(output.sin().sum() + new_hidden.sum(), list(module.parameters()))
        results.append([output, new_hidden, *grads])
    torch.testing.assert_close(*results)


def test_attributes() -> None:
    decoder = fastgru.Decoder(11, 5, 6)
    assert [name for name, _ in decoder.named_children()] == ["embedding", "rnn", "out"]
    assert isinstance(decoder.rnn, fastgru.GRU)
    assert decoder.rnn.batch_first is False


@pytest.mark.parametrize(("batch_first", "shape", "rows"), [(True, (3, 4), 3), (False, (4, 3), 4)])
def test_decoder_takes_the_last_of_the_second_axis(batch_first: bool, shape: tuple[int, int], rows: int) -> None:
    decoder = fastgru.Decoder(11, 5, 6, batch_first=batch_first)
    tokens = torch.randint(11, shape)
    logits, _ = decoder(tokens)
    output, _ = decoder.rnn(decoder.embedding(tokens))
    assert logits.shape == (rows, 11)
    torch.testing.assert_close(logits, decoder.out(output[:, -1, :]))
