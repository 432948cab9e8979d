"""Stage 1: compile every kernel that the other stages use for the GPU at hand, and write down what came of it.

    python benchmarks/gpu/build.py [--out DIR]

One entry per kernel variant: registers per thread, bytes spilled, shared memory, and, of Triton's, the time of the
first call. What is compiled ahead of time, in CUDA C++, is read from the library with cuobjdump.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import stage
import torch

import fastgru
from fastgru import _library


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        brought = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(brought) if brought.exists() else None
    return found


def library_kernels(listing: str) -> list[dict[str, Any]]:
    """What ``cuobjdump -res-usage`` lists, one entry per kernel and architecture."""
    found, arch = [], ""
    for line in listing.splitlines():
        if target := re.match(r"arch = (\w+)", line):
            arch = target[1]
        elif name := re.match(r"\s*Function (\S+?):?$", line):
            found.append({"kernel": name[1], "architecture": arch})
        elif found and (numbers := dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line))):
            found[-1] |= {
                "registers": int(numbers["REG"]),
                "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
                "static_shared": int(numbers["SHARED"]),
            }
    return found


def variants(names: set[int]) -> list[tuple[str, Any]]:
    """Compiled kernels that are not in ``names`` yet, which holds their ids."""
    from fastgru.kernels.gru import backward, cell, forward

    kernels = [value for module in (forward, backward, cell) for value in vars(module).values()]
    found = []
    for kernel in kernels:
        for caches in getattr(kernel, "device_caches", {}).values():
            found += [(kernel.__name__, one) for one in caches[0].values() if id(one) not in names]
    names.update(id(one) for _, one in found)
    return found


def main() -> None:
    arguments = stage.parser(__doc__).parse_args()
    stage.require_gpu()
    record = stage.Record("build", arguments.out, arguments.minutes)
    fastgru.use_backend("triton")
    seen: set[int] = set()
    for precision in stage.PRECISIONS:
        dtype = stage.set_precision(precision)
        for hidden in (64, 128, 192, 256, 512, 768, 1024):
            for batch in (16, 32, 64, 256):
                if record.late(f"{precision} H={hidden} B={batch}"):
                    continue
                module = fastgru.GRU(hidden, hidden, device="cuda", dtype=dtype)
                start = time.perf_counter()
                module(torch.randn(2, batch, hidden, device="cuda", dtype=dtype))[0].sum().backward()
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                for name, kernel in variants(seen):
                    record.add(
                        kernel=name, precision=precision, H=hidden, B=batch, first_call_seconds=seconds,
                        registers=kernel.n_regs, spills=kernel.n_spills, shared=kernel.metadata.shared,
                        warps=kernel.metadata.num_warps,
                    )  # fmt: skip
    tool = cuobjdump()
    if _library.load_error is not None or tool is None:
        record.content["left_out"].append(f"kernels in CUDA C++: {_library.load_error or 'there is no cuobjdump'}")
    else:
        command = [tool, "-res-usage", str(_library.LIBRARY_PATH)]
        for kernel in library_kernels(subprocess.run(command, capture_output=True, text=True, check=False).stdout):
            record.add(**kernel)
    record.set(finished=True)
    spilled = [entry for entry in record.content["entries"] if entry["spills"]]
    print(f"{len(record.content['entries'])} kernels, {len(spilled)} of them spill; written to {record.path}")


if __name__ == "__main__":
    main()
