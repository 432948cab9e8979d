"""What the kernels over the whole grid compile to: as test_cuda_compiles.py, which has the tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_cuda_compiles import ARCHITECTURES, CSRC, MATRIX, NVCC, PRECISIONS, REGISTERS, by_kernel, run, tool

pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs nvcc, of the CUDA toolkit")

THREADS = 256


def of(direction: str, listing: str, header: str) -> dict[tuple[str, int], str]:
    """The kernels of one direction in a listing: {(precision, columns): text}."""
    parts = [part for part in listing.split(header)[1:] if f"gru_grid_{direction}" in part.partition("\n")[0]]
    return by_kernel(header.join(["", *parts]), header)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def binary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "kernels.cubin"
    run(
        NVCC,
        "-cubin",
        "-O3",
        "-std=c++17",
        f"-I{CSRC}",
        f"-arch=sm_{request.param}",
        CSRC / "cuda" / "gru" / "grid.cu",
        "-o",
        path,
    )
    return path


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_grid_kernels(direction: str, binary: Path) -> None:
    usage = of(direction, run(tool("cuobjdump"), "-res-usage", binary), " Function ")
    assert usage.keys() == {(precision, columns) for precision in PRECISIONS for columns in (1, 2)}
    for kernel, text in usage.items():
        numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, (kernel, text)
        assert numbers["SHARED"] <= 1024, (kernel, text)
        assert (numbers["REG"] + 7) // 8 * 8 * THREADS <= REGISTERS, (kernel, text)
    machine_code = of(direction, run(tool("cuobjdump"), "-sass", binary), "Function : ")
    assert machine_code.keys() == usage.keys()
    for (precision, columns), text in machine_code.items():
        found = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)
        assert not {"LDL", "STL"} & {name.split(".")[0] for name in found}, (precision, columns)
        assert {name for name in found if "MMA" in name} == {MATRIX[precision]}, (precision, columns)
        # Words of the exchange go past the caches of a multiprocessor; a fence stands in the loop.
        assert "LDG.E.64.STRONG.GPU" in found and any(name.startswith("MEMBAR") for name in found)
        assert any(name.startswith("STG.E") and name.endswith("STRONG.GPU") for name in found)
