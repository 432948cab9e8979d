"""Implements an encoder and a decoder on fastgru.GRU, and both, as their oracle, on torch.nn.GRU."""

from __future__ import annotations

from torch import Tensor, nn

from fastgru.nn.gru import GRU


class _Encoder(nn.Module):
    """Embedding, then a GRU.

    Args:
        vocab_size, embedding_dim, hidden_dim: the sizes V, E, H.
        batch_first: tokens are [B, T] instead of [T, B].

    Shapes: input int64 [T, B]; hidden [1, B, H]; output [T, B, H] and the new hidden [1, B, H].
    """

    gru_class: type[GRU] | type[nn.GRU]

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int, batch_first: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.rnn = self.gru_class(embedding_dim, hidden_dim, batch_first=batch_first)

    def forward(self, input: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, hidden = self.rnn(self.embedding(input), hidden)
        return output, hidden


class _Decoder(_Encoder):
    """An encoder with a linear head on ``output[:, -1, :]``.

    That is the last time step with ``batch_first=True``. Time-major, the default, it is the last *batch element*, which
    is what the reference computes.

    Shapes: input and hidden as in the encoder; the result is [B, V] ([T, V] when time-major) and hidden [1, B, H].
    """

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int, batch_first: bool = False) -> None:
        super().__init__(vocab_size, embedding_dim, hidden_dim, batch_first)
        self.out = nn.Linear(hidden_dim, vocab_size)

    def forward(self, input: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, hidden = self.rnn(self.embedding(input), hidden)
        return self.out(output[:, -1, :]), hidden


class Encoder(_Encoder):
    __doc__ = _Encoder.__doc__
    gru_class = GRU


class Decoder(_Decoder):
    __doc__ = _Decoder.__doc__
    gru_class = GRU


class ReferenceEncoder(_Encoder):
    """The encoder on torch.nn.GRU."""

    gru_class = nn.GRU


class ReferenceDecoder(_Decoder):
    """The decoder on torch.nn.GRU."""

    gru_class = nn.GRU
