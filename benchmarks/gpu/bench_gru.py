"""Stage 3: the GRU on this GPU beside nn.GRU, by H, B and dtype, at T and 2T.

    python benchmarks/gpu/bench_gru.py [--out DIR] [--precisions bfloat16 ...] [--minutes M]

Contenders: our Triton kernels; the same in a CUDA graph (forward only); our cudnn backend; nn.GRU itself, with its
weights in one chunk. One layer, I = H, whole calls, input projection included. A contender's outputs are compared with
nn.GRU in float64 before it is timed; if they break the rule of fastgru.testing it is not. The time of a step is the
difference between 2T and T, over T. Also: the copy and matmul ceilings of the card, and the memory of a training
step. Most wanted first: what the minutes do not suffice for is listed as left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import stage
import torch
from roofline import gpu_roofline
from timing import device_time, peak_bytes
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastgru

STEPS = 256  # T; the other length is twice that
SHAPES = [
    # H, B
    *[(hidden, batch) for hidden in (256, 512, 768, 1024) for batch in (32, 1, 64)],
    *[(hidden, batch) for hidden in (64, 128, 192) for batch in (32, 1, 256)],
    *[(hidden, batch) for hidden in (256, 512, 1024) for batch in (8, 128, 256)],
    (768, 16), (1536, 16), (2048, 16), (2048, 128),
]  # fmt: skip
KINDS = [
    # training, packed, directions
    (False, False, 1),
    (True, False, 1),
    (False, True, 1),
    (True, True, 1),
    (True, False, 2),
]


class Problem:
    """One problem at one length: weights, input, and what to compare with."""

    def __init__(
        self, hidden: int, batch: int, steps: int, dtype: torch.dtype, training: bool, packed: bool, directions: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.training = training
        self.exact = nn.GRU(hidden, hidden, bidirectional=directions == 2, dtype=torch.float64, device="cuda")
        x = torch.randn(steps, batch, hidden, generator=generator, dtype=torch.float64).to("cuda", dtype)
        self.theirs = nn.GRU(hidden, hidden, bidirectional=directions == 2, dtype=dtype, device="cuda")
        self.theirs.load_state_dict(self.exact.state_dict())
        self.exact.load_state_dict(self.theirs.state_dict())
        self.ours = fastgru.GRU(hidden, hidden, bidirectional=directions == 2, dtype=dtype, device="cuda")
        self.ours.load_state_dict(self.theirs.state_dict())
        self.input: Tensor | PackedSequence = x
        if packed:
            lengths = torch.randint(steps // 4, steps + 1, (batch,), generator=generator)
            lengths[0] = steps
            self.input = pack_padded_sequence(x, lengths, enforce_sorted=False)
        with torch.no_grad():
            self.want = self._output(self.exact, self.input.to(torch.float64))
            self.limit = 2 * (self._output(self.theirs, self.input).double() - self.want).abs().max().item()
        self.limit += 4 * torch.finfo(dtype).eps * self.want.abs().max().item()

    @staticmethod
    def _output(module: Any, input: Any) -> Tensor:
        output = module(input)[0]
        return output.data if isinstance(output, PackedSequence) else output

    def error(self) -> float:
        with torch.no_grad():
            return (self._output(self.ours, self.input).double() - self.want).abs().max().item()

    def call(self, module: Any) -> Callable[[], Any]:
        if not self.training:

            def forward() -> None:
                with torch.no_grad():
                    module(self.input)

            return forward
        seed = torch.randn_like(self._output(module, self.input))

        def step() -> None:
            module.zero_grad(set_to_none=True)
            self._output(module, self.input).backward(seed)

        return step


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(problem: Problem) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for backend in ("triton", "cudnn"):
        with fastgru.use_backend(backend):
            error = problem.error()
            if not error <= problem.limit:
                result[backend] = {"error": error, "limit": problem.limit, "refused": "breaks the numeric rule"}
                continue
            call = problem.call(problem.ours)
            result[backend] = {"error": error, **device_time(call), "peak_bytes": peak_bytes(call)}
            if backend == "triton" and not problem.training and isinstance(problem.input, Tensor):
                result["triton_graph"] = device_time(graphed(call))
    call = problem.call(problem.theirs)
    result["nn.GRU"] = {**device_time(call), "peak_bytes": peak_bytes(call)}
    return result


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--precisions", nargs="+", choices=stage.PRECISIONS, default=list(stage.PRECISIONS))
    arguments = parser.parse_args()
    stage.require_gpu()
    record = stage.Record("bench_gru", arguments.out, arguments.minutes)
    from fastgru.backends.gpu_table import architecture

    record.set(architecture=architecture("cuda"), ceilings=gpu_roofline())
    for training, packed, directions in KINDS:
        for precision in arguments.precisions:
            for hidden, batch in SHAPES:
                dtype = stage.set_precision(precision)
                sizes = {"H": hidden, "B": batch, "directions": directions, "training": training, "packed": packed}
                if record.late(f"{precision} {sizes}"):
                    continue
                per_length = {}
                for steps in (STEPS, 2 * STEPS):
                    problem = Problem(hidden, batch, steps, dtype, training, packed, directions)
                    per_length[steps] = measure(problem)
                    record.add(precision=precision, T=steps, **sizes, contenders=per_length[steps])
                short, long = per_length[STEPS], per_length[2 * STEPS]
                slopes = {
                    name: (long[name]["device_us"] - short[name]["device_us"]) / STEPS
                    for name in long
                    if "device_us" in long[name] and "device_us" in short.get(name, {})
                }
                record.content["entries"][-1]["us_per_step"] = slopes
                record.set()
    record.set(finished=True)
    print(f"{len(record.content['left_out'])} left out; written to {record.path}")


if __name__ == "__main__":
    main()
