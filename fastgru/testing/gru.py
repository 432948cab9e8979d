"""GRU problems, and the rule applied to them: outputs and every gradient against nn.GRU in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastgru.nn import GRU
from fastgru.nn.gru import TorchGRU
from fastgru.testing.rule import Comparison, compare, failures

# Draws times H that a problem gets, at the least.
_SAMPLE = 24


@dataclass(frozen=True)
class GruProblem:
    """A GRU and its input. ``packed`` gives the rows of the batch random lengths, in no order."""

    T: int = 5
    B: int = 3
    I: int = 7
    H: int = 7
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    packed: bool = False
    hx: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("bidirectional", "bias", "batch_first", "packed", "hx") if getattr(self, name)]
        sizes = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.num_layers}"
        return "-".join([sizes, *flags, str(self.dtype).removeprefix("torch.")])


def parity(problem: GruProblem, save_gates: bool = True, draws: int | None = None) -> list[Comparison]:
    """Outputs and every gradient of :class:`fastgru.GRU`, on the backend in use, under the rule.

    Args:
        problem: what to compute.
        save_gates: the module's.
        draws: how many draws of the problem the largest errors are of; by default more for fewer hidden units.
    """
    count = max(1, _SAMPLE // problem.H) if draws is None else draws
    found = [_draw(problem, problem.seed + 1000 * i, save_gates) for i in range(count)]
    return [compare(name, [draw[name] for draw in found], problem.dtype) for name in found[0]]


def _draw(problem: GruProblem, seed: int, save_gates: bool) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Every output and gradient, as (ours, nn.GRU's, the reference)."""
    generator = torch.Generator().manual_seed(seed)
    # nn.GRU's own error in float64 is estimated in float32, so the numbers must be exact in both.
    rounded = torch.float32 if problem.dtype == torch.float64 else problem.dtype

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(rounded).double()

    directions = 2 if problem.bidirectional else 1
    sequence = (problem.B, problem.T) if problem.batch_first else (problem.T, problem.B)
    input = draw(*sequence, problem.I)
    hx = draw(problem.num_layers * directions, problem.B, problem.H) if problem.hx else None
    lengths = None
    rows: tuple[int, ...] = sequence
    if problem.packed:
        lengths = torch.randint(1, problem.T + 1, (problem.B,), generator=generator)
        rows = (int(lengths.sum()),)
    grad_output = draw(*rows, directions * problem.H)
    grad_h_n = draw(problem.num_layers * directions, problem.B, problem.H)

    exact = _module(TorchGRU, problem, torch.float64)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(draw(*parameter.shape, scale=problem.H**-0.5))

    def run(module: nn.RNNBase) -> dict[str, Tensor]:
        module.load_state_dict(exact.state_dict())
        return _run(module, input, hx, lengths, problem.batch_first, grad_output, grad_h_n)

    reference = run(exact)
    theirs = run(_module(TorchGRU, problem, rounded))
    ours_module = _module(GRU, problem, problem.dtype)
    assert isinstance(ours_module, GRU)
    ours_module.save_gates = save_gates
    ours = run(ours_module)
    return {name: (ours[name], theirs[name], reference[name]) for name in reference}


def assert_parity(problem: GruProblem, save_gates: bool = True) -> None:
    """Raises AssertionError that lists every tensor of :func:`parity` which breaks the rule."""
    broken = failures(parity(problem, save_gates))
    if broken:
        raise AssertionError(f"{problem}:\n  " + "\n  ".join(broken))


def _module(kind: type[nn.GRU] | type[GRU], problem: GruProblem, dtype: torch.dtype) -> nn.RNNBase:
    return kind(
        problem.I,
        problem.H,
        problem.num_layers,
        bias=problem.bias,
        batch_first=problem.batch_first,
        bidirectional=problem.bidirectional,
        device=problem.device,
        dtype=dtype,
    )


def _run(
    module: nn.RNNBase,
    input: Tensor,
    hx: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
    grad_output: Tensor,
    grad_h_n: Tensor,
) -> dict[str, Tensor]:
    """Outputs and gradients of one module, in its own dtype, on the host in float64."""
    like = module.weight_hh_l0
    assert isinstance(like, Tensor)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(like).detach().requires_grad_()

    x, h0 = leaf(input), None if hx is None else leaf(hx)
    fed: Tensor | PackedSequence = x
    if lengths is not None:
        fed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    output, h_n = module(fed, h0)
    if isinstance(output, PackedSequence):
        output = output.data
    wanted = {"input": x, **({} if h0 is None else {"hx": h0}), **dict(module.named_parameters())}
    grads = torch.autograd.grad((output, h_n), list(wanted.values()), (grad_output.to(like), grad_h_n.to(like)))
    tensors = {"output": output, "h_n": h_n, **{f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}}
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in tensors.items()}
