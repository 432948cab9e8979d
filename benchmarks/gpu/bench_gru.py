"""Stage 3: the GRU on this GPU beside nn.GRU, by H, B and dtype, at T and 2T.

    python benchmarks/gpu/bench_gru.py [--out DIR] [--precisions bfloat16 ...] [--minutes M]

Contenders: our CUDA C++ kernels, and the grid's where the library chooses the cluster's; our Triton kernels; either in
a CUDA graph (forward only); our cudnn backend; nn.GRU itself, with its weights in one chunk. One layer, I = H, whole
calls, input projection included. A contender's outputs are compared with nn.GRU in float64 before it is timed; if they
break the rule of fastgru.testing it is not. The time of a step is the difference between 2T and T, over T. Also: the
copy and matmul ceilings of the card; the memory of a training step, and what its forward pass leaves for backward.
Most wanted first: what the minutes do not suffice for is listed as left out. ``goals`` in the record says what was
aimed at, and what came of it.
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
from fastgru import testing
from fastgru.ops.gru import cuda

# Name, backend, kernel of the recurrence. "cuda" is the one that the library chooses.
CONTENDERS = (
    ("cuda", "cuda", ""),
    ("cuda_grid", "cuda", "grid"),
    ("triton", "triton", ""),
    ("cudnn", "cudnn", ""),
)
OURS = {"cuda", "triton"}
STEPS = 256  # T; the other length is twice that
SHAPES = [
    # H, B
    (768, 16),
    *[(hidden, batch) for hidden in (256, 512, 768, 1024) for batch in (32, 1, 64)],
    *[(hidden, batch) for hidden in (64, 128, 192) for batch in (32, 1, 256)],
    *[(hidden, batch) for hidden in (256, 512, 1024) for batch in (8, 128, 256)],
    (1536, 16), (2048, 16), (2048, 128),
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
        self.training, self.packed = training, packed
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
            torch_error = (self._output(self.theirs, self.input).double() - self.want).abs().max().item()
        self.limit = testing.error_limit(torch_error, self.want.abs().max().item(), dtype)

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


def held_bytes(problem: Problem, module: Any) -> int:
    """What a forward pass leaves allocated for backward, its results not counted."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    results = module(problem.input)
    output = results[0].data if isinstance(results[0], PackedSequence) else results[0]
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    return held - sum(t.numel() * t.element_size() for t in (output, results[1]))


def contend(problem: Problem, module: Any) -> dict[str, Any]:
    call = problem.call(module)
    found = {**device_time(call), "peak_bytes": peak_bytes(call)}
    return found | ({"held_bytes": held_bytes(problem, module)} if problem.training else {})


def measure(problem: Problem) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, backend, loop in CONTENDERS:
        if loop and "refused" in result["cuda"]:
            continue
        cuda.KERNELS.loop = loop
        try:
            with fastgru.use_backend(backend):
                error = problem.error()
                if not error <= problem.limit:
                    result[name] = {"error": error, "limit": problem.limit, "refused": "breaks the numeric rule"}
                    continue
                result[name] = {"error": error, **contend(problem, problem.ours)}
                # A packed batch brings Triton a copy from the host, which no graph may hold.
                if not problem.training and (backend == "cuda" or (backend == "triton" and not problem.packed)):
                    result[f"{name}_graph"] = device_time(graphed(problem.call(problem.ours)))
        except fastgru.BackendUnavailable as refused:
            result[name] = {"refused": str(refused)}
        finally:
            cuda.KERNELS.loop = ""
    result["nn.GRU"] = contend(problem, problem.theirs)
    return result


def goals(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, of bfloat16 against the best precision of nn.GRU, and the worst that was measured; None where
    nothing was."""
    slopes = {
        (e["H"], e["B"], e["directions"], e["training"], e["packed"], e["precision"]): e["us_per_step"]
        for e in entries
        if "us_per_step" in e
    }
    held = [
        e["contenders"]["cuda"]["held_bytes"] / e["contenders"]["nn.GRU"]["held_bytes"]
        for e in entries
        if e["training"] and "held_bytes" in e["contenders"].get("cuda", {})
    ]

    def ours(key: tuple[Any, ...]) -> list[float]:
        found = slopes.get((*key, "bfloat16"), {})
        return [min(found[name] for name in ("cuda", "triton") if name in found)] if found.keys() & OURS else []

    def ratios(training: bool, packed: bool, wanted: Callable[[int, int], bool]) -> list[float]:
        found = []
        for hidden, batch, *kind in {key[:5] for key in slopes}:
            if kind == [1, training, packed] and wanted(hidden, batch):
                key = (hidden, batch, *kind)
                theirs = [
                    slopes[(*key, p)]["nn.GRU"] for p in stage.PRECISIONS if "nn.GRU" in slopes.get((*key, p), {})
                ]
                found += [min(theirs) / mine for mine in ours(key) if theirs]
        return found

    small = [(hidden, batch) for hidden, batch in SHAPES if batch <= 32]
    made: list[dict[str, Any]] = []

    def add(goal: str, limit: float, values: list[float], at_most: bool) -> None:
        worst = (max if at_most else min)(values, default=None)
        met = None if worst is None else worst <= limit if at_most else worst >= limit
        made.append({"goal": goal, "limit": limit, "worst": worst, "of": len(values), "met": met})

    for hidden, limit in ((256, 1.0), (512, 1.5), (768, 2.0), (1024, 2.5)):
        times = [t for h, b in small if h == hidden for t in ours((h, b, 1, False, False))]
        add(f"us per step of forward, H={hidden}, B<=32", limit, times, at_most=True)

    def in_range(hidden: int, batch: int) -> bool:
        return 256 <= hidden <= 1024 and batch <= 64

    add("times nn.GRU, forward", 4, ratios(False, False, in_range), at_most=False)
    add("times nn.GRU, forward and backward", 3, ratios(True, False, in_range), at_most=False)
    add("times nn.GRU, forward, H<=192", 1.3, ratios(False, False, lambda hidden, batch: hidden <= 192), at_most=False)
    add("times nn.GRU, forward, packed", 4, ratios(False, True, in_range), at_most=False)
    for peer, published in (("FlashRNN's LSTM", 4.8), ("cuDNN's persistent LSTM", 1.96)):
        goal = f"us per step of forward, H=768, B=16, of {peer} as published"
        add(goal, published, ours((768, 16, 1, False, False)), at_most=True)
    add("held for backward, of nn.GRU's", 0.8, held, at_most=True)
    return made


def main() -> None:
    parser = stage.parser(__doc__)
    parser.add_argument("--precisions", nargs="+", choices=stage.PRECISIONS, default=list(stage.PRECISIONS))
    arguments = parser.parse_args()
    stage.require_gpu()
    record = stage.Record("bench_gru", arguments.out, arguments.minutes)
    from fastgru.backends.measured import architecture

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
                record.set(goals=goals(record.content["entries"]))
    record.set(finished=True)
    print(f"{len(record.content['left_out'])} left out; written to {record.path}")


if __name__ == "__main__":
    main()
