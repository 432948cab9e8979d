"""Stage 4: where the time of a call goes, kernel by kernel.

    python benchmarks/gpu/profile_gru.py [--out DIR]

torch.profiler over one training step of a few problems: calls and device time of every kernel, and the time the GPU
waited between the first kernel and the last.
"""

from __future__ import annotations

import stage
import torch
from torch.profiler import ProfilerActivity, profile

import fastgru

PROBLEMS = [(128, 32), (256, 32), (512, 16), (1024, 64), (1024, 256)]  # H, B
STEPS = 128


def main() -> None:
    arguments = stage.parser(__doc__).parse_args()
    stage.require_gpu()
    record = stage.Record("profile", arguments.out, arguments.minutes)
    for precision in ("bfloat16", "tf32"):
        dtype = stage.set_precision(precision)
        for hidden, batch in PROBLEMS:
            for backend in ("cuda", "triton", "cudnn"):
                if record.late(f"{backend} {precision} H={hidden} B={batch}"):
                    continue
                if reason := stage.why_not(backend, dtype, hidden, batch):
                    record.add(backend=backend, precision=precision, H=hidden, B=batch, refused=reason)
                    continue
                with fastgru.use_backend(backend):
                    module = fastgru.GRU(hidden, hidden, device="cuda", dtype=dtype)
                    x = torch.randn(STEPS, batch, hidden, device="cuda", dtype=dtype, requires_grad=True)
                    for _ in range(3):
                        module(x)[0].sum().backward()
                    torch.cuda.synchronize()
                    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                        module(x)[0].sum().backward()
                        torch.cuda.synchronize()
                on_gpu = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
                start = min(event.time_range.start for event in on_gpu)
                end = max(event.time_range.end for event in on_gpu)
                busy = sum(event.time_range.elapsed_us() for event in on_gpu)
                kernels: dict[str, list[float]] = {}
                for event in on_gpu:
                    kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
                record.add(
                    backend=backend, precision=precision, H=hidden, B=batch, T=STEPS, busy_us=busy,
                    span_us=end - start, idle_us=end - start - busy,
                    kernels={name: {"calls": len(us), "us": sum(us)} for name, us in kernels.items()},
                )  # fmt: skip
    record.set(finished=True)
    print(f"{len(record.content['left_out'])} left out; written to {record.path}")


if __name__ == "__main__":
    main()
