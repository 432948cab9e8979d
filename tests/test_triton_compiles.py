"""What the Triton kernels compile to, for GPUs that need not be here: they fit, spill nothing and use matrix units."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgru.backends.triton import INTERPRETED
from fastgru.ops.gru import triton as backend

triton = pytest.importorskip("triton", "3.6", reason="needs Triton: pip install 'triton>=3.6'")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set")

# Bytes of shared memory that one block may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The matrix instruction of a tile of 64 rows; smaller tiles use HMMA everywhere.
WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
FIXED = {"table_ptr": "*i32", "state_ptr": "*fp32", "carry_ptr": "*fp32"}


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, arch: int) -> Any:
    """The kernel for a packed batch with biases: what leaves most to do."""
    names = kernel.arg_names
    given = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in given else FIXED.get(name, POINTERS[dtype]) if name.endswith("_ptr") else "i32"
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = triton.compiler.ASTSource(kernel, signature, given, aligned)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)


def disassemble(kernel: Any, folder: Path) -> str:
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout


def assert_fits(kernel: Any, arch: int, folder: Path) -> str:
    """No spills, no more shared memory than there is. Returns the machine code."""
    assert kernel.metadata.shared <= SHARED[arch]
    code = disassemble(kernel, folder)
    assert "EXIT" in code
    assert not re.findall(r"\b(?:LDL|STL)\b.*", code)
    return code


BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
CASES = [
    # H, B, dtype, TF32, architecture
    (128, 16, BRAIN, False, 90),
    (128, 16, HALF, False, 100),
    (64, 16, SINGLE, False, 80),
    (512, 16, BRAIN, False, 90),
    (768, 256, HALF, False, 80),
    (1024, 256, BRAIN, False, 90),
    (512, 256, BRAIN, False, 100),
    (300, 256, SINGLE, False, 80),
    (300, 256, SINGLE, True, 90),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("H, B, dtype, tf32, arch", CASES)
def test_recurrence(direction: str, H: int, B: int, dtype: torch.dtype, tf32: bool, arch: int, tmp_path: Path) -> None:
    from fastgru.kernels.gru import backward, forward

    plan = backend.plan(H, B, 2, dtype, tf32)
    module = {"forward": forward, "backward": backward}[direction]
    kernel = getattr(module, f"gru_{direction}_{'resident' if plan.resident else 'step'}")
    code = assert_fits(compiled(kernel, plan.constants, plan.options, dtype, arch), arch, tmp_path)
    exact = dtype == SINGLE and not tf32
    matrix = set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", code))
    assert matrix == (set() if exact else {WIDE[arch] if plan.constants["BLOCK_B"] == 64 else "HMMA"})


@pytest.mark.parametrize("name", ["gru_gates", "gru_previous_states"])
def test_rows_at_once(name: str, tmp_path: Path) -> None:
    from fastgru.kernels.gru import backward, cell

    kernel = getattr(cell if name == "gru_gates" else backward, name)
    constants = {"H": 300, "D": 2, "GATE_STRIDE": 304, "BLOCK_N": 16, "BLOCK_B": 16, "BLOCK_H": 64}
    assert_fits(compiled(kernel, constants, {"enable_fp_fusion": True}, HALF, 90), 90, tmp_path)
