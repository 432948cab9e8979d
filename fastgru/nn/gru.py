"""GRU and GRUCell: torch.nn's modules in every respect but the kernels."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastgru import ops


class GRU(nn.RNNBase):
    """A drop-in for ``torch.nn.GRU``: constructor, parameters, initialisation, ``state_dict``, repr, errors.

    It derives from ``nn.RNNBase``, not ``nn.GRU``, because torch.compile refuses every instance of ``nn.GRU``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in nn.GRU.
        save_gates: keep the gates for the backward pass. With False it recomputes them, which trades time for memory.

    Shapes, with D = 2 when bidirectional, else 1:
        input: [T, I], [T, B, I], [B, T, I] when ``batch_first``, or a PackedSequence. Any strides.
        hx: [D * num_layers, B, H], or [D * num_layers, H] for unbatched input; zeros when not given.
        output: as input, with D * H features. h_n: as hx.

    Raises:
        ValueError, TypeError: nn.GRU's, for constructor arguments; input of wrong rank or dtype.
        RuntimeError: nn.GRU's, for wrong sizes, wrong dtype or device of ``hx``, zero-length sequences.
    """

    save_gates: bool

    def __init__(self, *args: Any, save_gates: bool = True, **kwargs: Any) -> None:
        # Position 8 is RNNBase's proj_size: nn.GRU takes it there, and then fails at the first call.
        if "proj_size" in kwargs or (len(args) > 7 and args[7] != 0):
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)
        self.save_gates = save_gates

    def flatten_parameters(self) -> None:
        """Accepted and needless: the kernels take the parameters wherever they are."""

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.save_gates else ", save_gates=False")

    def _weights(self) -> list[Tensor]:
        """The current weights, which may have been replaced, parametrized or swapped by functional_call."""
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the sequence. See the class for shapes and errors."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        rank = input.dim()
        if rank == 3:
            if hx is not None and hx.dim() != 3:
                raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
            return self._run(input, hx, input.size(0 if self.batch_first else 1), None)
        if rank != 2:
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {rank}D instead")
        if hx is not None:
            if hx.dim() != 2:
                raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
            hx = hx.unsqueeze(1)
        batch_dim = 0 if self.batch_first else 1
        output, h_n = self._run(input.unsqueeze(batch_dim), hx, 1, None)
        return output.squeeze(batch_dim), h_n.squeeze(1)

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
        weights = self._weights()
        expected = (self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
        if hx is None:
            hx = torch.zeros(expected, dtype=input.dtype, device=input.device)
        if (
            input.dtype is not weights[0].dtype
            or input.dim() != (3 if batch_sizes is None else 2)
            or input.size(-1) != self.input_size
            or hx.shape != expected
        ):
            # RNNBase's own checks word the error. They let a foreign dtype pass under autocast, and so do we.
            self._flat_weights = list(weights)
            self.check_forward_args(input, hx, batch_sizes)
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

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step. See the class for shapes and errors."""
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
