"""What the CUDA kernels compile to, for GPUs that need not be here: no spills, one block per multiprocessor, matrix
units, and the instructions of the exchange between blocks."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs nvcc, of the CUDA toolkit")

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("80", "90a", "100")
REGISTERS = 65536  # of a multiprocessor
THREADS = 384
# The matrix instruction of each precision.
MATRIX = {"bf16": "HMMA.16816.F32.BF16", "f16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"}
PRECISIONS = list(MATRIX)


def tool(name: str) -> Path:
    triton = pytest.importorskip("triton", reason=f"needs {name}, which comes with Triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def by_kernel(listing: str, header: str) -> dict[tuple[str, int], str]:
    """Splits a listing at its kernels: {(precision, columns): text}. Both are in the mangled name."""
    kernels = {}
    for part in listing.split(header)[1:]:
        name, _, text = part.partition("\n")
        found = re.search(r"PrecisionE(\d)ELi(\d)E", name)
        assert found is not None, name
        kernels[PRECISIONS[int(found[1])], int(found[2])] = text
    return kernels


@pytest.mark.parametrize("source", ["cluster_forward.cu", "cluster_backward.cu"])
def test_cluster_kernels(source: str, tmp_path: Path) -> None:
    binary = tmp_path / "kernels.o"
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    run(NVCC, "-c", "-O3", "-std=c++17", f"-I{CSRC}", *code, CSRC / "cuda" / "gru" / source, "-o", binary)
    all_kernels = {(precision, columns) for precision in PRECISIONS for columns in (1, 2)}
    for arch in ARCHITECTURES:
        usage = by_kernel(run(tool("cuobjdump"), "-res-usage", "-arch", f"sm_{arch}", binary), " Function ")
        assert usage.keys() == all_kernels
        for kernel, text in usage.items():
            numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
            assert numbers["STACK"] == numbers["LOCAL"] == 0, (arch, kernel, text)
            # No more than the system keeps for itself of each block's; the rest is dynamic, at most 227 KiB.
            assert numbers["SHARED"] <= 1024, (arch, kernel, text)
            # A thread's registers are given out by eight.
            assert (numbers["REG"] + 7) // 8 * 8 * THREADS <= REGISTERS, (arch, kernel, text)
        machine_code = by_kernel(run(tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", binary), "Function : ")
        assert machine_code.keys() == all_kernels
        for (precision, columns), text in machine_code.items():
            found = collections.Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M))
            names = {name.split(".")[0] for name in found}
            if arch == "80":  # no clusters: the body is left out
                assert names <= {"EXIT", "BRA", "NOP", "MOV", "IMAD"}, (precision, columns, names)
                continue
            assert not names & {"LDL", "STL", "HGMMA", "UTCHMMA"}, (arch, precision, columns)
            assert {name for name in found if "MMA" in name} == {MATRIX[precision]}, (arch, precision, columns)
            assert found["STAS.128"] > 0, "messages between blocks"
            assert any(name.startswith("SYNCS.PHASECHK") and "TRYWAIT" in name for name in found), "barriers"
            # At the start and at the end, and never in the loop.
            assert found["UCGABAR_ARV"] == found["UCGABAR_WAIT"] == 2, (arch, precision, columns)
