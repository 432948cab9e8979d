"""Implements GRU and GRUCell, torch.nn's modules in every respect but the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fastgru import ops
from fastgru._torch_private import takes_per_sample_gradients
from fastgru.nn.torch_tools import check_settings, fx_leaf, gru_signature, recorded_zeros, torch_twin
from fastgru.ops.gru import eager
from fastgru.ops.gru.segments import Segments, batch_states, cut, segment_states

# torch's own, whatever the names in torch.nn stand for later (see fastgru.patch).
TorchGRU, TorchGRUCell = nn.GRU, nn.GRUCell


class GRU(nn.RNNBase):
    """A drop-in for ``torch.nn.GRU``: constructor, parameters, initialisation, ``state_dict``, repr, errors.

    It derives from ``nn.RNNBase``, not ``nn.GRU``, because torch.compile refuses every instance of ``nn.GRU``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in nn.GRU.
        save_gates: keep the gates for the backward pass. With False it recomputes them, which trades time for memory.

    Shapes, with D = 2 when bidirectional, else 1:
        input: [T, I], [T, B, I], [B, T, I] when ``batch_first``, a PackedSequence, or a nested tensor of layout
            torch.jagged and shape [B, lengths, I]. Any strides.
        hx: [D * num_layers, B, H], or [D * num_layers, H] for unbatched input; zeros when not given.
        lengths: integers [B] from 0 to T, for padded input: how many steps of each sequence are real. The output is
            zero after them, and h_n is the state at the last real one (``hx`` where there is none).
        reset_mask: bool [T, B], [B, T] when ``batch_first``, [T] for unbatched input: True zeroes the state before that
            step, in every layer. Nothing flows across, so each part of a sequence is run as one of its own; in the
            reverse direction too, where the state is zeroed on the way from that step to the one before it.
        output: as input, with D * H features. h_n: as hx.

    ``lengths`` and ``reset_mask`` are read on the host, at every call: of a GPU's tensors that waits for the GPU.

    Raises:
        ValueError, TypeError: nn.GRU's, for constructor arguments; input of wrong rank or dtype; wrong ``lengths`` or
            ``reset_mask``.
        RuntimeError: nn.GRU's, for wrong sizes, wrong dtype or device of ``hx``, zero-length sequences.
    """

    # On the class as well, for modules that fastgru.convert makes of others.
    save_gates = True
    # TorchScript would compile it, also where torch.jit.trace meets exported methods.
    __jit_unused_properties__ = ["all_weights", "_flat_weights"]  # noqa: RUF012

    def __init__(self, *args: Any, save_gates: bool = True, **kwargs: Any) -> None:
        # Position 8 is RNNBase's proj_size: nn.GRU takes it there, and then fails at the first call.
        if "proj_size" in kwargs or (len(args) > 7 and args[7] != 0):
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)
        self.save_gates = save_gates

    # For those who ask what the arguments are called, as nn.utils.skip_init does.
    __init__.__signature__ = gru_signature  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> nn.Module:
        return torch_twin(self, GRU, TorchGRU)

    def _slow_forward(self, input: Any, hx: Tensor | None = None, *rest: Any, **options: Any) -> Any:
        """What torch.jit.trace and the old ONNX exporter call in the place of ``forward``."""
        # That exporter also passes what the caller left out.
        padded = any(value is not None for value in (*rest, *options.values()))
        if torch.onnx.is_in_onnx_export() and not padded and type(self).forward is GRU.forward:
            # It knows torch's operators and no others.
            return TorchGRU.forward(self, input, hx)  # type: ignore[call-overload]
        if hx is None and isinstance(input, PackedSequence):
            hx = recorded_zeros(self, input)
        return super()._slow_forward(input, hx, *rest, **options)  # type: ignore[no-untyped-call]

    def flatten_parameters(self) -> None:
        """Accepted and needless: the kernels take the parameters wherever they are."""

    def _init_flat_weights(self) -> None:
        # RNNBase keeps a list of the weights and weak references to them, which bar torch.utils.swap_tensors.
        self._flat_weight_refs: list[Any] = []

    def _update_flat_weights(self) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._init_flat_weights()

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.save_gates else ", save_gates=False")

    @property  # type: ignore[override]
    def _flat_weights(self) -> list[Tensor]:
        """The current weights, which may have been replaced, parametrized or swapped by functional_call.

        Not the list that RNNBase keeps: a list of parametrized weights goes stale and cannot be copied.
        """
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            return [getattr(self, name, None) for name in self._flat_weights_names]  # type: ignore[misc]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor]) -> None:
        pass

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the sequence. See the class for shapes and errors."""
        if lengths is not None or reset_mask is not None:
            return self._forward_padded(input, hx, lengths, reset_mask)
        if type(input) is Tensor and not (self.training and self.dropout) and not torch.compiler.is_compiling():
            result = eager.gru(self.__dict__, input, hx, self.save_gates)
            if result is not None:
                return result
        # All that is not a plain tensor, and first the Tensor subclasses that are none of these.
        if type(input) is not Tensor:
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx)
            if isinstance(input, Proxy):
                return fx_leaf(self, input, hx)
            if getattr(input, "is_nested", False):
                return self._forward_nested(input, hx)
        rank = input.dim()
        if rank == 3:
            if hx is not None and hx.dim() != 3:
                raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
            return self._run(input, hx, input.size(0 if self.batch_first else 1), None)
        if rank != 2:
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {rank}D instead")
        hx = self._batched_hx(hx)
        batch_dim = 0 if self.batch_first else 1
        output, h_n = self._run(input.unsqueeze(batch_dim), hx, 1, None)
        return output.squeeze(batch_dim), h_n.squeeze(1)

    @staticmethod
    def _batched_hx(hx: Tensor | None) -> Tensor | None:
        """The ``hx`` of unbatched input, as that of a batch of one."""
        if hx is None:
            return None
        if hx.dim() != 2:
            raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
        return hx.unsqueeze(1)

    def _forward_padded(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
        reset_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(input, Proxy):
            result: tuple[Tensor, Tensor] = fx_leaf(self, input, hx, lengths=lengths, reset_mask=reset_mask)
            return result
        if not isinstance(input, Tensor) or input.is_nested:
            kind = "nested tensor" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"lengths and reset_mask are for padded tensors, got a {kind} as input")
        if input.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths is for batched 3-D input, got 2-D input")
            batch_dim = 0 if self.batch_first else 1
            if isinstance(reset_mask, Tensor) and reset_mask.dim() == 1:
                reset_mask = reset_mask.unsqueeze(batch_dim)
            output, h_n = self._forward_padded(input.unsqueeze(batch_dim), self._batched_hx(hx), None, reset_mask)
            return output.squeeze(batch_dim), h_n.squeeze(1)
        if input.dim() != 3:
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if self.batch_first:
            input = input.transpose(0, 1)
        T, B, _ = input.shape
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        parts = cut(input, lengths, None, reset_mask, self.batch_first)
        output, h_n = self._run_segments(input.reshape(T * B, input.size(2)), hx, B, parts)
        output = output.view(T, B, output.size(1))
        return (output.transpose(0, 1) if self.batch_first else output), h_n

    def _forward_nested(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        if input.dim() != 3 or input.size(2) != self.input_size:
            raise ValueError(
                f"jagged input has to be of shape [B, lengths, {self.input_size}], got {list(input.shape)}"
            )
        nested: Any = input
        offsets, lengths = nested.offsets(), nested.lengths()
        parts = cut(input.values(), lengths, offsets, None, False)
        output, h_n = self._run_segments(input.values(), hx, offsets.size(0) - 1, parts)
        return torch.nested.nested_tensor_from_jagged(output, offsets, lengths), h_n

    def _run_segments(self, flat: Tensor, hx: Tensor | None, batch: int, parts: Segments) -> tuple[Tensor, Tensor]:
        """Output [rows of ``flat``, D * H], zero where no segment is, and h_n."""
        if takes_per_sample_gradients(self._flat_weights):
            raise RuntimeError(
                "call_for_per_sample_grads takes rows for samples, which they are not with lengths, resets or nested "
                "input: pass plain sequences, or one at a time"
            )
        directions = 2 if self.bidirectional else 1
        expected = (self.num_layers * directions, batch, self.hidden_size)
        if hx is None:
            hx = torch.zeros(expected, dtype=flat.dtype, device=flat.device)
        if hx.dim() != 3:
            raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
        self.check_hidden_size(hx, expected)
        if hx.device != flat.device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {flat.device} "
                f"and hidden tensor at {hx.device}"
            )
        if not parts.recorded and parts.row.numel() == 0:
            return flat.new_zeros(flat.size(0), directions * self.hidden_size), hx
        rows, given = flat.size(0), hx
        if parts.recorded:
            # Room for the segment that stands for none.
            flat, hx = F.pad(flat, (0, 0, 0, 1)), F.pad(hx, (0, 0, 0, 1))
        states = segment_states(hx, parts, directions)
        packed, h_n = self._run(flat.index_select(0, parts.positions), states, states.size(1), parts.batch_sizes)
        output = packed.new_zeros(flat.size(0), packed.size(1)).index_copy(0, parts.positions, packed)
        return output[:rows], batch_states(h_n, given, parts, directions)

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        # A compiler cannot compare hx with a number that it does not know; the operator does it at run time.
        batch = hx.size(1) if hx is not None and torch.compiler.is_compiling() else int(batch_sizes[0])
        output, h_n = self._run(data, hx, batch, batch_sizes)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(h_n, unsorted_indices)

    def _run(self, input: Tensor, hx: Tensor | None, batch: int, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = self._flat_weights
        expected = (self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
        if hx is None:
            hx = torch.zeros(expected, dtype=input.dtype, device=input.device)
        if (
            input.dtype is not weights[0].dtype
            or input.dim() != (3 if batch_sizes is None else 2)
            or input.size(-1) != self.input_size
            or hx.shape != expected
            or self.proj_size != 0
        ):
            # RNNBase's own checks word the error. They let a foreign dtype pass under autocast, and so do we.
            self.check_forward_args(input, hx, batch_sizes)
        if not (
            type(self.bias) is type(self.training) is type(self.bidirectional) is type(self.batch_first) is bool
            and type(self.num_layers) is int
            and type(self.dropout) is float
        ):
            check_settings(self)
        return ops.gru(
            input,
            hx,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes,
            self.save_gates,
        )


class GRUCell(nn.GRUCell):
    """A drop-in for ``torch.nn.GRUCell``.

    Shapes: input [B, I] or [I]; hx and the result [B, H] or [H]; hx is zeros when not given.

    Raises:
        ValueError, RuntimeError: nn.GRUCell's, for wrong rank, size, dtype or device.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        return torch_twin(self, GRUCell, TorchGRUCell)

    def _slow_forward(self, *input: Any, **options: Any) -> Any:
        """What torch.jit.trace and the old ONNX exporter call in the place of ``forward``."""
        if torch.onnx.is_in_onnx_export() and type(self).forward is GRUCell.forward:
            return super().forward(*input, **options)
        return super()._slow_forward(*input, **options)  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step. See the class for shapes and errors."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return fx_leaf(self, input, hx)
        if hx is not None and not torch.compiler.is_compiling():
            state = eager.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
            if state is not None:
                return state
        if input.dim() not in (1, 2):
            raise ValueError(f"GRUCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"GRUCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
        if hx is None:
            hx = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
        new = ops.gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return new if batched else new.squeeze(0)
