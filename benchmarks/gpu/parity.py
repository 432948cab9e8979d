"""Stage 2: every test of the GRU on the GPU, and compute-sanitizer on small shapes.

    python benchmarks/gpu/parity.py [--out DIR]

1. The tests of the GPU backends (pytest).
2. The problems of tests/test_gru_parity.py, all pairs of their settings, under the rule of fastgru.testing: outputs and
   every gradient, with the gates saved and recomputed, on every GPU backend, and of ``cuda`` on each of its kernels for
   the recurrence. float32 with TF32 off everywhere, then with TF32 on everywhere. What a backend refuses is listed.
3. memcheck and racecheck, where compute-sanitizer is installed.

Ends with status 1 if anything failed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import stage

import fastgru
from fastgru.ops.gru import cuda
from fastgru.testing import GruProblem, failures, parity

SMALL = """
import torch, fastgru
from fastgru.ops.gru import cuda
from torch.nn.utils.rnn import pack_padded_sequence
torch.backends.cuda.matmul.allow_tf32 = True
for backend, loop in (("triton", ""), ("cuda", "cluster"), ("cuda", "grid")):
    cuda.KERNELS.loop = loop
    ran = 0
    for hidden in (20, 64, 160):
        for dtype in (torch.bfloat16, torch.float32):
            module = fastgru.GRU(8, hidden, bidirectional=True, device="cuda", dtype=dtype)
            x = torch.randn(6, 5, 8, device="cuda", dtype=dtype)
            try:
                with fastgru.use_backend(backend):
                    module(x)[0].sum().backward()
                    module(pack_padded_sequence(x, [6, 1, 4, 1, 1], enforce_sorted=False))[0].data.sum().backward()
                ran += 1
            except fastgru.BackendUnavailable as error:
                print(backend, loop, hidden, dtype, error)
    torch.cuda.synchronize()
    print(backend, loop, "ran", ran)
"""

# Of cuda, each kernel for the recurrence; the library's own choice is one of them.
CONTENDERS = (("triton", ""), ("cuda", "cluster"), ("cuda", "grid"), ("cudnn", ""))


def run_tests(record: stage.Record) -> bool:
    names = (
        "test_cuda.py", "test_triton.py", "test_triton_compiles.py", "test_cudnn.py", "test_attention_gluon.py",
        "test_attention_gluon_backward.py",
    )  # fmt: skip
    files = [str(stage.ROOT / "tests" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    done = subprocess.run(command, cwd=stage.ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    record.add(
        check="pytest", ok=done.returncode == 0, summary=lines[-1] if lines else done.stderr[-2000:],
        failed=[line for line in lines if line.startswith(("FAILED", "ERROR"))],
    )  # fmt: skip
    return done.returncode == 0


def problems() -> list[GruProblem]:
    path = stage.ROOT / "tests" / "test_gru_parity.py"
    spec = importlib.util.spec_from_file_location("gru_problems", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [dataclasses.replace(problem, device="cuda") for problem in module.SELECTION + module.LARGER]


def check_problems(record: stage.Record) -> bool:
    fine = True
    for problem in problems():
        name = str(problem.dtype).removeprefix("torch.")
        for precision in ["float32", "tf32"] if name == "float32" else [name]:
            if precision in stage.PRECISIONS:
                stage.set_precision(precision)
            for backend, loop in CONTENDERS:
                what = " ".join(filter(None, (backend, loop, precision, str(problem))))
                if record.late(what):
                    continue
                cuda.KERNELS.loop = loop
                try:
                    with fastgru.use_backend(backend):
                        found = [c for save_gates in (True, False) for c in parity(problem, save_gates)]
                except fastgru.BackendUnavailable as error:
                    record.add(check=what, refused=str(error))
                    continue
                finally:
                    cuda.KERNELS.loop = ""
                broken = failures(found)
                fine &= not broken
                record.add(check=what, ok=not broken, failed=broken)
    return fine


def sanitize(record: stage.Record) -> bool:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    fine = True
    for check in ("memcheck", "racecheck"):
        if not Path(tool).exists():
            record.content["left_out"].append(f"{check}: compute-sanitizer is not installed")
            continue
        if record.late(check):
            continue
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SMALL]
        done = subprocess.run(command, cwd=stage.ROOT, capture_output=True, text=True, check=False)
        fine &= done.returncode == 0
        record.add(check=check, ok=done.returncode == 0, summary=(done.stdout + done.stderr)[-2000:])
    return fine


def main() -> int:
    arguments = stage.parser(__doc__).parse_args()
    stage.require_gpu()
    record = stage.Record("parity", arguments.out, arguments.minutes)
    fine = [check(record) for check in (run_tests, check_problems, sanitize)]
    record.set(ok=all(fine), finished=True)
    left_out = len(record.content["left_out"])
    print(f"{'everything that ran passed' if all(fine) else 'FAILED'}, {left_out} left out; written to {record.path}")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
