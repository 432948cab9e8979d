"""Implements torch.nn.MultiheadAttention's interface, and a decoder that attends to its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgru import _torch_private, ops
from fastgru.nn.seq2seq import Decoder
from fastgru.nn.torch_tools import torch_twin
from fastgru.ops.attention.arguments import ArgumentError, as_mask, is_causal_bias
from fastgru.ops.nested import from_padded, to_padded

# torch's own, whatever the name in torch.nn stands for later (see fastgru.patch).
TorchMultiheadAttention = nn.MultiheadAttention

_SCORES = ("dot", "general", "additive")


def _records() -> bool:
    """Whether there may be a backward pass. torch.jit.trace looks at a module with gradients and without, and wants the
    same operators."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and _torch_private.is_tracing())


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in for :class:`torch.nn.MultiheadAttention`: same arguments, attributes, ``state_dict`` and shapes.

    With ``need_weights=False`` memory is linear in the lengths. A query that may see no key gets the output projection
    of 0, with zero gradients, where torch gives NaN; a key or value that no query may see has no influence.

    query, key and value may also be nested tensors [B, lengths, E], of either layout, without masks: they are padded
    for the computation. The output has query's layout; the weights, with ``need_weights``, are padded with zeros.

    Raises:
        AssertionError, RuntimeError, TypeError: as torch's.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        return torch_twin(self, MultiheadAttention, TorchMultiheadAttention)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. Arguments, results and shapes are torch.nn.MultiheadAttention's."""
        if query.is_nested or key.is_nested or value.is_nested:
            masks = key_padding_mask, attn_mask
            return self._forward_nested(query, key, value, masks, need_weights, average_attn_weights, is_causal)
        if is_causal_bias(attn_mask):
            attn_mask = ~as_mask(attn_mask, query)
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        extra = self.add_zero_attn or self.bias_k is not None
        # The hint says that attn_mask is the causal mask: then it need not be read.
        hinted = bool(is_causal and not need_weights and key_padding_mask is None and not extra)
        self._check_masks(query, key, key_padding_mask, None if hinted else attn_mask)

        inputs = query, key, value
        if _records():
            own = key is query and value is query
            unseen = None if own else self._unseen(query, key, key_padding_mask, attn_mask, hinted)
            inputs = self._kept(query, key, value, unseen)
        q, k, v = self._project(*inputs)
        mask = None if hinted else self._mask(query, key, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        weights = None
        if need_weights:
            attended, weights = ops.attention_weights(q, k, v, mask, dropout)
            if average_attn_weights:
                weights = weights.mean(1)
            if not batched:
                weights = weights.squeeze(0)
        else:
            attended = ops.flash_attention(
                q, k, v, attn_mask=mask, causal=hinted, causal_align="top_left", dropout_p=dropout
            )
        output = F.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), weights
        return output if self.batch_first else output.transpose(0, 1), weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tensors = query, key, value
        whole = all(t.is_nested and t.dim() == 3 for t in tensors)
        if not (whole and self.batch_first) or masks != (None, None) or is_causal:
            raise AssertionError(
                "MultiheadAttention takes nested tensors as query, key and value together, [B, lengths, E], with "
                "batch_first=True and neither masks nor is_causal"
            )
        # Self-attention stays that.
        q = to_padded("query", query, -2)
        k = q if key is query else to_padded("key", key, -2)
        v = q if value is query else k if value is key else to_padded("value", value, -2)
        if not torch.equal(k[1], v[1]) or len(q[1]) != len(k[1]):
            raise AssertionError(
                "nested query, key and value must have as many sequences, and key and value of the same lengths, got "
                f"{q[1].tolist()}, {k[1].tolist()} and {v[1].tolist()}"
            )
        empty_rows, padding = (torch.arange(t.size(1), device=t.device) >= n.unsqueeze(-1) for t, n in (q, k))
        output, weights = MultiheadAttention.forward(
            self, q[0], k[0], v[0], padding, need_weights, None, average_attn_weights
        )
        if weights is not None:
            rows = empty_rows.unsqueeze(-1)
            weights = weights.masked_fill(rows if average_attn_weights else rows.unsqueeze(1), 0)
        return from_padded(output, query, q[1], -2), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """What torch refuses, in its words."""
        rank = query.dim()
        for name, mask, ranks in (
            ("key_padding_mask", key_padding_mask, (rank - 1,)),
            ("attn_mask", attn_mask, (2, 3)),
        ):
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise TypeError(f"{name} must be Tensor, not {type(mask).__name__}")
            if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
                raise AssertionError(f"only bool and floating types of {name} are supported")
            if rank in (2, 3) and mask.dim() not in ranks:
                expected = " or ".join(f"{r}-D" for r in ranks)
                raise AssertionError(
                    f"For {'batched' if rank == 3 else 'unbatched'} ({rank}-D) `query`, expected `{name}` to be `None`"
                    f"{',' if len(ranks) > 1 else ' or'} {expected} but found {mask.dim()}-D tensor instead"
                )
        if rank not in (2, 3):
            raise AssertionError(
                f"query should be unbatched 2D or batched 3D tensor but received {rank}-D query tensor"
            )
        if key.dim() != rank or value.dim() != rank:
            raise AssertionError(
                f"For {'batched' if rank == 3 else 'unbatched'} ({rank}-D) `query`, expected `key` and `value` to be "
                f"{rank}-D but found {key.dim()}-D and {value.dim()}-D tensors respectively"
            )
        if rank == 2 and attn_mask is not None and attn_mask.dim() == 3:
            expected_shape = (self.num_heads, query.size(0), key.size(0))
            if attn_mask.shape != expected_shape:
                raise AssertionError(f"Expected `attn_mask` shape to be {expected_shape} but got {attn_mask.shape}")
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if query.size(-1) != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.size(-1)}")
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        else:
            if key.shape[:-1] != value.shape[:-1]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
                )
            for name, t, size in (("key", key, self.kdim), ("value", value, self.vdim)):
                if t.size(-1) != size:
                    raise AssertionError(
                        f"expecting {name} weights shape of {(self.embed_dim, t.size(-1))}, but got "
                        f"{torch.Size((self.embed_dim, size))}"
                    )

    def _check_masks(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Sizes, of what is [B, L, E]."""
        B, Lq, Lk = query.size(0), query.size(1), key.size(1)
        if key.size(0) != B:
            raise ArgumentError(f"query and key must have one batch size, got {B} and {key.size(0)}")
        if attn_mask is not None:
            shape = (Lq, Lk) if attn_mask.dim() == 2 else (B * self.num_heads, Lq, Lk)
            if attn_mask.shape != shape:
                raise ArgumentError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {shape}."
                )
        if key_padding_mask is not None and key_padding_mask.shape != (B, Lk):
            dim = 0 if key_padding_mask.size(0) != B else 1
            raise AssertionError(
                f"Expected key_padded_mask.shape[{dim}] to be {(B, Lk)[dim]}, but got {key_padding_mask.shape[dim]}"
            )

    def _unseen(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, hinted: bool
    ) -> Tensor | None:
        """[B or 1, Lk]: which keys no query of any head may see; a tensor of its own."""
        unseen = None
        if hinted:
            Lq, Lk = query.size(1), key.size(1)
            unseen = (torch.arange(Lk, device=key.device) >= Lq).unsqueeze(0) if Lk > Lq else None
        elif attn_mask is not None:
            hides = attn_mask if attn_mask.dtype is torch.bool else attn_mask.to(query.dtype) == -torch.inf
            every = hides.unsqueeze(0) if hides.dim() == 2 else hides.unflatten(0, (key.size(0), -1)).flatten(1, 2)
            unseen = every.all(1)
        if key_padding_mask is not None:
            padding = key_padding_mask
            padding = padding.clone() if padding.dtype is torch.bool else padding.to(query.dtype) == -torch.inf
            unseen = padding if unseen is None else unseen | padding
        return unseen

    def _kept(self, query: Tensor, key: Tensor, value: Tensor, unseen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the projections keep for the backward pass.

        Keys and values that no query sees are 0 in it: zero times NaN is not zero, and they must not reach the
        gradients of the projections. And it is a copy wherever torch makes one: batch-first input may be overwritten.
        """
        if self._qkv_same_embed_dim:
            learns = self.in_proj_weight.requires_grad
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            learns = any(weight.requires_grad for weight in weights)
        copies = self.batch_first and learns

        def kept(t: Tensor) -> Tensor:
            if unseen is not None and t is not query:
                return t.masked_fill(unseen.unsqueeze(-1), 0)
            return t.clone() if copies else t

        q = kept(query)
        k = q if key is query else kept(key)
        v = q if value is query else k if value is key else kept(value)
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, E] of each, with the learnt and the zero key and value at the end where there are any."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if query is key and key is value and self._qkv_same_embed_dim:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            inputs = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (F.linear(x, weight, bias) for x, weight, bias in inputs)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, learnt.to(t.dtype).expand(t.size(0), 1, -1)], 1)
                for t, learnt in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _mask(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one, as flash_attention takes it: bool, True may be seen, or floating."""
        parts = []
        if attn_mask is not None:
            parts.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (query.size(0), -1)))
        if key_padding_mask is not None:
            padding = key_padding_mask[:, None, None]
            # A copy, as torch makes one: the caller may overwrite it.
            parts.append(padding.clone() if padding.is_floating_point() and attn_mask is None else padding)
        if not parts:
            return None
        # In these arguments True hides.
        if all(part.dtype is torch.bool for part in parts):
            mask = ~parts[0] if len(parts) == 1 else ~(parts[0] | parts[1])
            fill: float = True
        else:
            like = query.new_zeros(())
            floats = [
                like.masked_fill(part, -torch.inf) if part.dtype is torch.bool else part.to(query.dtype)
                for part in parts
            ]
            mask = floats[0] if len(floats) == 1 else floats[0] + floats[1]
            fill = 0.0
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(mask, (0, extra), value=fill) if extra else mask


def _as_lengths(lengths: Any, encoder_outputs: Tensor) -> Tensor | None:
    """int64 [B], on the device of ``encoder_outputs``, which are [B, S, encoder_dim]."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(list(lengths), device=encoder_outputs.device)
    integers = not (lengths.dtype is torch.bool or lengths.is_floating_point() or lengths.is_complex())
    if not (integers or lengths.numel() == 0) or lengths.shape != encoder_outputs.shape[:1]:
        raise ValueError(
            f"source_lengths must be [B] = [{encoder_outputs.size(0)}] integers, how many positions of each source are "
            f"no padding, got {list(lengths.shape)} of {lengths.dtype}"
        )
    found: Tensor = lengths.to(encoder_outputs.device, torch.int64)
    return found


class AttentionDecoder(Decoder):
    """A decoder that attends to the encoder's outputs before its linear head.

    With h_t the states of its GRU and e_s the encoder's outputs, the context is c_t = sum_s softmax_s(score) e_s, and
    the head reads tanh(W_c [c_t; h_t]). The scores:

    - "dot": h_t . e_s (Luong; needs encoder_dim = hidden_dim),
    - "general": h_t . W_a e_s (Luong),
    - "additive": v . tanh(W_q h_t + W_k e_s) (Bahdanau), in memory linear in the lengths.

    Args:
        vocab_size, embedding_dim, hidden_dim, batch_first: as in the decoder without attention.
        score: "dot", "general" or "additive".
        encoder_dim: columns of the encoder's outputs, hidden_dim by default; 2 * hidden_dim behind a bidirectional one.

    Shapes: input, hidden and result as in the decoder without attention; encoder_outputs [S, B, encoder_dim], or
    [B, S, encoder_dim] with ``batch_first``; source_lengths [B] integers, a tensor or a sequence: the positions from
    there on are padding.

    Raises:
        ValueError: an unknown score, or a size that it does not allow; encoder_outputs or source_lengths of the wrong
            shape or dtype.
        BackendUnavailable: "additive", and a backend other than ``reference`` was asked for by name.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        batch_first: bool = False,
        *,
        score: str = "general",
        encoder_dim: int | None = None,
    ) -> None:
        super().__init__(vocab_size, embedding_dim, hidden_dim, batch_first)
        encoder_dim = hidden_dim if encoder_dim is None else encoder_dim
        if score not in _SCORES:
            raise ValueError(f"score must be one of {', '.join(_SCORES)}, got {score!r}")
        if score == "dot" and encoder_dim != hidden_dim:
            raise ValueError(f"score 'dot' needs encoder_dim = hidden_dim, got {encoder_dim} and {hidden_dim}")
        self.score = score
        self.encoder_dim = encoder_dim
        if score != "dot":
            self.key = nn.Linear(encoder_dim, hidden_dim, bias=False)
        if score == "additive":
            self.query = nn.Linear(hidden_dim, hidden_dim)
            self.weight = nn.Parameter(torch.empty(hidden_dim).uniform_(-(hidden_dim**-0.5), hidden_dim**-0.5))
        self.combine = nn.Linear(encoder_dim + hidden_dim, hidden_dim, bias=False)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("torch.jit.script cannot compile fastgru.AttentionDecoder: use torch.jit.trace")

    def attend(
        self, states: Tensor, encoder_outputs: Tensor, source_lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """What the linear head reads: tanh(W_c [context; state]) of every state.

        Shapes: states [B, T, hidden_dim], encoder_outputs [B, S, encoder_dim], both batch-major; result as states.
        """
        source_lengths = _as_lengths(source_lengths, encoder_outputs)
        if source_lengths is not None and self.score != "dot" and _records():
            # NaN in the padding must not reach the gradient of W_a or W_k: zero times NaN is not zero.
            place = torch.arange(encoder_outputs.size(1), device=encoder_outputs.device)
            padding = place >= source_lengths.unsqueeze(-1)
            encoder_outputs = encoder_outputs.masked_fill(padding.unsqueeze(-1), 0)
        if self.score == "additive":
            keys = self.key(encoder_outputs)
            context = ops.additive_attention(
                self.query(states), keys, encoder_outputs, self.weight, k_lengths=source_lengths
            )
        else:
            keys = encoder_outputs if self.score == "dot" else self.key(encoder_outputs)
            context = ops.flash_attention(
                states.unsqueeze(1),
                keys.unsqueeze(1),
                encoder_outputs.unsqueeze(1),
                scale=1.0,
                k_lengths=source_lengths,
            ).squeeze(1)
        return torch.tanh(self.combine(torch.cat([context, states], -1)))

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        hidden: Tensor | None,
        encoder_outputs: Tensor,
        source_lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder. See the class for shapes and errors."""
        batch = input.size(0 if self.rnn.batch_first else 1)
        batch_dim = 0 if self.rnn.batch_first else 1
        if (
            encoder_outputs.dim() != 3
            or encoder_outputs.size(batch_dim) != batch
            or encoder_outputs.size(2) != self.encoder_dim
        ):
            layout = "[B, S, encoder_dim]" if self.rnn.batch_first else "[S, B, encoder_dim]"
            raise ValueError(
                f"encoder_outputs must be {layout} with B = {batch} and encoder_dim = {self.encoder_dim}, "
                f"got {list(encoder_outputs.shape)}"
            )
        batch_major = encoder_outputs if self.rnn.batch_first else encoder_outputs.transpose(0, 1)
        source_lengths = _as_lengths(source_lengths, batch_major)
        states, hidden = self.rnn(self.embedding(input), hidden)
        # Only output[:, -1, :] reaches the head: the last step, or (time-major) the last element of the batch.
        if self.rnn.batch_first:
            states = states[:, -1:]
        else:
            states, batch_major = states.transpose(0, 1)[-1:], batch_major[-1:]
            source_lengths = None if source_lengths is None else source_lengths[-1:]
        attended = self.attend(states, batch_major, source_lengths)
        return self.out(attended.flatten(0, 1)), hidden
