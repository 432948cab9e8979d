"""The attention modules: torch.nn.MultiheadAttention's interface, and a decoder that attends to its encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgru import ops
from fastgru.nn.scripting import torch_twin
from fastgru.nn.seq2seq import Decoder

# torch's own, whatever the name in torch.nn stands for later (see fastgru.patch).
TorchMultiheadAttention = nn.MultiheadAttention

_SCORES = ("dot", "general", "additive")


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in for :class:`torch.nn.MultiheadAttention`: same arguments, attributes, ``state_dict`` and shapes.

    With ``need_weights=False`` memory is linear in the lengths. A query that may see no key gets the output projection
    of 0, with zero gradients, where torch gives NaN; what a padded key or value holds has no influence.

    Nested tensors are not taken.

    Raises:
        ValueError: masks of the wrong shape or dtype; inputs of wrong rank.
        RuntimeError: ``is_causal`` without ``attn_mask``.
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
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "query, key and value must all be batched (3-D) or unbatched (2-D), got "
                f"{query.dim()}-D, {key.dim()}-D and {value.dim()}-D"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0]:
            raise ValueError(
                f"query, key and value must have one batch size, key and value one length, got (batch first) "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )

        if key is not query and key_padding_mask is not None and key_padding_mask.dtype is torch.bool:
            key, value = self._without_padding(key, value, key_padding_mask)
        q, k, v = self._project(query, key, value)
        mask = self._mask(query, key, key_padding_mask, attn_mask)
        # The hint says that attn_mask is the causal mask: then it need not be read.
        hinted = is_causal and not need_weights and key_padding_mask is None and k.size(1) == key.size(1)
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
                q,
                k,
                v,
                attn_mask=None if hinted else mask,
                causal=hinted,
                causal_align="top_left",
                dropout_p=dropout,
            )
        output = F.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), weights
        return output if self.batch_first else output.transpose(0, 1), weights

    def _without_padding(self, key: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """NaN in the padding must not reach the gradients of the projections: zero times NaN is not zero."""
        if padding.shape != key.shape[:2]:
            return key, value  # an error, which _mask has the words for
        shown = key.masked_fill(padding.unsqueeze(-1), 0)
        return shown, shown if key is value else value.masked_fill(padding.unsqueeze(-1), 0)

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
        B, Lq, Lk = query.size(0), query.size(1), key.size(1)
        parts = []
        if attn_mask is not None:
            shapes = ((Lq, Lk), (B * self.num_heads, Lq, Lk))
            if attn_mask.shape not in shapes:
                raise ValueError(f"attn_mask must have shape {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}")
            parts.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(B, self.num_heads, Lq, Lk))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (B, Lk):
                raise ValueError(f"key_padding_mask must have shape {(B, Lk)}, got {tuple(key_padding_mask.shape)}")
            parts.append(key_padding_mask.view(B, 1, 1, Lk))
        for part in parts:
            if part.dtype is not torch.bool and not part.dtype.is_floating_point:
                raise ValueError(f"attn_mask and key_padding_mask must be bool or floating, got {part.dtype}")
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
    [B, S, encoder_dim] with ``batch_first``; source_lengths [B] integers: the positions from there on are padding.

    Raises:
        ValueError: an unknown score, or a size that it does not allow; encoder_outputs of the wrong shape.
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

    def attend(self, states: Tensor, encoder_outputs: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """What the linear head reads: tanh(W_c [context; state]) of every state.

        Shapes: states [B, T, hidden_dim], encoder_outputs [B, S, encoder_dim], both batch-major; result as states.
        """
        if source_lengths is not None and torch.is_grad_enabled() and self.score != "dot":
            # NaN in the padding must not reach the gradient of W_a or W_k: zero times NaN is not zero.
            place = torch.arange(encoder_outputs.size(1), device=encoder_outputs.device)
            padding = place >= source_lengths.to(place.device).unsqueeze(-1)
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
        source_lengths: Tensor | None = None,
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
        states, hidden = self.rnn(self.embedding(input), hidden)
        # Only output[:, -1, :] reaches the head: the last step, or (time-major) the last element of the batch.
        if self.rnn.batch_first:
            states = states[:, -1:]
        else:
            states, encoder_outputs = states.transpose(0, 1)[-1:], encoder_outputs.transpose(0, 1)[-1:]
            source_lengths = None if source_lengths is None else source_lengths[-1:]
        attended = self.attend(states, encoder_outputs, source_lengths)
        return self.out(attended.flatten(0, 1)), hidden
