"""Beside stage 3: the GRU by each of cuDNN's algorithms, called directly. PyTorch never takes the largest for a GRU.

    python benchmarks/gpu/cudnn_probe.py [--out DIR]

Compiles cudnn_probe.cpp with nvcc, against the cuDNN that PyTorch brought (the package nvidia.cudnn) or the system's.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import stage

STEPS = 256  # T; the other length is twice that
SHAPES = ["64:32", "128:32", *(f"{hidden}:{batch}" for hidden in (256, 512, 768, 1024) for batch in (1, 16, 32, 64))]


def build(folder: Path) -> Path:
    """The compiled probe.

    Raises:
        SystemExit: there is no nvcc, or it does not compile; with the reason.
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise SystemExit("the probe needs nvcc; install the CUDA toolkit, or put nvcc on the PATH")
    flags = ["-lcudnn"]
    if (spec := importlib.util.find_spec("nvidia")) is not None and spec.submodule_search_locations:
        for root in map(Path, spec.submodule_search_locations):
            if (library := root / "cudnn" / "lib").is_dir():
                flags = [f"-I{root / 'cudnn' / 'include'}", f"-L{library}"]
                flags += ["-Xlinker", "-l:libcudnn.so.9", "-Xlinker", f"-rpath={library}"]
    probe = folder / "cudnn_probe"
    command = [nvcc, "-O2", "-std=c++17", str(Path(__file__).with_suffix(".cpp")), "-o", str(probe), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the probe does not compile: {' '.join(command)}\n{done.stderr}")
    return probe


def main() -> None:
    arguments = stage.parser(__doc__).parse_args()
    stage.require_gpu()
    record = stage.Record("cudnn_probe", arguments.out, arguments.minutes)
    with tempfile.TemporaryDirectory() as folder:
        probe = build(Path(folder))
        for precision in stage.PRECISIONS:
            for shape in SHAPES:
                for steps in (STEPS, 2 * STEPS):
                    what = f"{precision} {shape} T={steps}"
                    if record.late(what):
                        continue
                    # One process each: a kernel that fails takes its process with it.
                    command = [str(probe), precision, str(steps), shape]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    for line in done.stdout.splitlines():
                        if line.endswith("}"):
                            record.add(**json.loads(line))
                    if done.returncode != 0:
                        record.add(problem=what, failed=done.stderr[-500:])
    record.set(finished=True)
    print(f"{len(record.content['left_out'])} left out; written to {record.path}")


if __name__ == "__main__":
    main()
