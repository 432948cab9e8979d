"""Compile the attention kernels for Hopper (sm_90a) to cubins, without a GPU, and describe how to launch them.

    python tools/build_cubins.py --out DIR

Gluon's interface changes with every Triton, so this takes the one Triton named here and no other; what comes out needs
none. DIR gets one cubin per kernel and manifest.json, whose "kernels" hold, by name:

    file, symbol, threads, shared     what to load and launch with; ``shared`` in bytes of dynamic memory
    arguments                         of the kernel, in order: [name, type]; the type "map" is a TMA descriptor of a 4-D
                                      tensor, which Triton follows with its sizes (int32) and strides (int64)
    maps                              by name, how descriptors are encoded: box, swizzle, element type
    sizes                             block sizes the caller has to know

It fails, and says which, where a kernel spills registers, does not fit into shared memory, or lacks the instructions it
is written for.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

#: The Triton that the kernels are written for and compiled with.
TRITON = "3.9.0"

#: Bytes of shared memory that one block may have.
SHARED = 227 * 1024

#: wgmma, TMA loads and stores, transaction barriers, reallocation of registers between warps; and a wait that leaves
#: the product of the next scores running.
INSTRUCTIONS = (
    r"\bHGMMA\.", r"\bUTMALDG\.4D\b", r"\bUTMASTG\.4D\b", r"\bSYNCS\.", r"\bUSETMAXREG\.",
    r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1\b",
)  # fmt: skip

#: Also TMA's addition in the backward pass, with its fence and counter; and the instructions of its small kernel.
BACKWARD_INSTRUCTIONS = (
    *INSTRUCTIONS, r"\bUTMAREDG\.4D\.ADD\b", r"\bFENCE\.VIEW\.ASYNC\.G\b", r"\bREDG\.E\.ADD\.STRONG\.GPU\b",
)  # fmt: skip
ROWS_INSTRUCTIONS = (r"\bUTMALDG\.4D\b", r"\bSYNCS\.")

DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
#: Block sizes by head dimension, limited by registers and shared memory. The warpgroups of the backward kernel divide
#: the columns of blocks of 64 keys, and the keys of blocks of 128.
FORWARD = {
    64: {"BLOCK_N": 128, "STAGES": 3, "Q_STAGES": 2},
    128: {"BLOCK_N": 128, "STAGES": 2, "Q_STAGES": 2},
    256: {"BLOCK_N": 64, "STAGES": 2, "Q_STAGES": 1},
}
BACKWARD = {
    64: {"BLOCK_M": 128, "BLOCK_N": 128},
    128: {"BLOCK_M": 64, "BLOCK_N": 128},
    256: {"BLOCK_M": 64, "BLOCK_N": 64},
}
POINTERS = {
    "lse": "*fp32", "statistics": "*fp32", "d_lse": "*fp32", "stats": "*fp32", "turns": "*i32", "plan": "*i32",
    "q_lengths": "*i64", "k_lengths": "*i64",
}  # fmt: skip

#: Descriptors of float32 tensors; the others are of the dtype of a variant.
FLOATS = ("dq_desc", "stats_desc")


class Variant(NamedTuple):
    """One kernel to compile: its name in the manifest, where it is, and what it is specialised on."""

    name: str
    module: str
    kernel: str
    dtype: str
    maps: dict[str, list[int]]
    constants: dict[str, int]
    instructions: tuple[str, ...] = INSTRUCTIONS
    #: An option of LLVM's, given by Triton's variable DISABLE_LLVM_OPT.
    llvm: str = ""


def variants() -> list[Variant]:
    found = []
    for dtype, columns in itertools.product(DTYPES, FORWARD):
        sizes = FORWARD[columns]
        rows = {"q_desc": 64, "k_desc": sizes["BLOCK_N"], "v_desc": sizes["BLOCK_N"], "o_desc": 64}
        found.append(
            Variant(
                f"attention_forward_{dtype}_{columns}", "attention_sm90.forward", "attention_forward", dtype,
                {name: [1, 1, count, columns] for name, count in rows.items()},
                sizes,
            )
        )  # fmt: skip
        sizes = BACKWARD[columns]
        block, width = sizes["BLOCK_M"], min(columns, 128)
        rows = {"q_desc": block, "do_desc": block, "k_desc": 64, "v_desc": 64, "dk_desc": 64, "dv_desc": 64}
        maps = {name: [1, 1, count, width] for name, count in rows.items()}
        maps |= {"stats_desc": [1, 1, 4, block], "dq_desc": [1, 1, 64, 64]}
        found.append(
            Variant(
                f"attention_backward_{dtype}_{columns}", "attention_sm90.backward", "attention_backward", dtype, maps,
                {**sizes, "STAGES": 2, "DS_STAGES": 1, "DQ_STAGES": 2}, BACKWARD_INSTRUCTIONS,
                # Otherwise values that depend on the thread are computed once for all partitions and kept, for which
                # there are too few registers.
                "disable-machine-cse",
            )
        )  # fmt: skip
        maps = {name: [1, 1, 64, width] for name in ("o_desc", "do_desc")}
        found.append(
            Variant(
                f"attention_backward_rows_{dtype}_{columns}", "attention_sm90.backward", "attention_backward_rows",
                dtype, maps, sizes, ROWS_INSTRUCTIONS,
            )
        )  # fmt: skip
    return found


def check_triton() -> Any:
    """Imports the pinned Triton; any other, or none, ends the program with the remedy."""
    # Line numbers would triple the size and tell where the build took place.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        triton = None
    if triton is None or triton.__version__ != TRITON:
        found = "there is none" if triton is None else f"{triton.__version__} is installed"
        raise SystemExit(f"tools/build_cubins.py needs Triton {TRITON} and {found}: pip install triton=={TRITON}")
    return triton


def kernel_module(name: str) -> types.ModuleType:
    """Imports a module of kernels/, such as attention_sm90.forward, without the fastgru package around it."""
    for package, path in (("fastgru", []), ("fastgru.kernels", [str(ROOT / "kernels")])):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = path
            sys.modules[package] = module
    return importlib.import_module(f"fastgru.kernels.{name}")


def compiled(variant: Variant) -> Any:
    """Compiles a variant, and returns the fields of Triton's kernel that are used here.

    LLVM keeps an option for the life of the process, so a variant with one is compiled in a process of its own.
    """
    triton = check_triton()
    if variant.llvm and os.environ.get("DISABLE_LLVM_OPT") != variant.llvm:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "kernel"
            command = [sys.executable, __file__, "--compile", variant.name, "--out", result]
            subprocess.run(command, env={**os.environ, "DISABLE_LLVM_OPT": variant.llvm}, check=True)
            return pickle.loads(result.read_bytes())
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(kernel_module(variant.module), variant.kernel)
    signature = {}
    for name in kernel.arg_names:
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in variant.maps:
            box = variant.maps[name]
            dtype, short = ("float32", "fp32") if name in FLOATS else (variant.dtype, DTYPES[variant.dtype])
            layout = gl.NVMMASharedLayout.get_default_for(box, getattr(gl, dtype))
            signature[name] = f"tensordesc<{short}[{','.join(map(str, box))}],{layout!r}>"
        else:
            signature[name] = POINTERS.get(name, "fp32" if name == "scale" else "i32")
    index = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {index[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")}
    source = GluonASTSource(
        kernel, signature, {index[name]: value for name, value in variant.constants.items()}, aligned
    )
    # 3 x 128 threads start with 168 registers each; the producer's warpgroup releases most of its own.
    options = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    fields = (
        "name", "num_warps", "shared", "tensordesc_meta", "global_scratch_size", "profile_scratch_size",
    )  # fmt: skip
    return types.SimpleNamespace(
        asm={"cubin": kernel.asm["cubin"]},
        metadata=types.SimpleNamespace(**{name: getattr(kernel.metadata, name) for name in fields}),
        src=types.SimpleNamespace(signature=signature),
    )


def disassembled(cubin: bytes, folder: Path) -> str:
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def faults(kernel: Any, code: str, instructions: tuple[str, ...] = INSTRUCTIONS) -> list[str]:
    """The reasons why a compiled kernel must not be shipped."""
    found = []
    spills = re.findall(r"\b(?:LDL|STL)\b", code)
    if spills:
        found.append(f"it spills registers ({len(spills)} instructions)")
    if kernel.metadata.shared > SHARED:
        found.append(f"it takes {kernel.metadata.shared} bytes of shared memory, and there are {SHARED}")
    products, starts = (len(re.findall(word, code)) for word in (r"\bHGMMA\.", r"\bWARPGROUP\.ARRIVE\b"))
    if starts > products / 2 > 0:
        found.append("its products wait for each other, for want of registers")
    found += [f"its code has no {one}" for one in instructions if not re.search(one, code)]
    if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        found.append("it needs scratch memory, which nobody gives it")
    return found


def described(variant: Variant, kernel: Any) -> dict[str, Any]:
    """The entry of the manifest."""
    source = kernel.src
    arguments = []
    for name, kind in source.signature.items():
        if kind != "constexpr":
            arguments.append([name, "map" if kind.startswith("tensordesc") else "pointer" if kind[0] == "*" else kind])
    described_maps = zip(
        [name for name, kind in arguments if kind == "map"], kernel.metadata.tensordesc_meta, strict=True
    )
    return {
        "file": f"{variant.name}.cubin",
        "symbol": kernel.metadata.name,
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "arguments": arguments,
        "maps": {
            name: {
                # The box of one copy, innermost last; a swizzle of 128 bytes bounds its last size.
                "box": meta["block_size"],
                "swizzle": meta["swizzle"],
                # CUtensorMapDataType counts like Triton, but for the floating types from fp64 on.
                "element": {8: 10, 9: 8, 10: 9}.get(meta["elem_type"], meta["elem_type"]),
            }
            for name, meta in described_maps
        },
        "sizes": variant.constants,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile", metavar="NAME", help="one variant only, for this program itself")
    given = parser.parse_args()
    folder: Path = given.out
    check_triton()
    if given.compile:
        (variant,) = (one for one in variants() if one.name == given.compile)
        folder.write_bytes(pickle.dumps(compiled(variant)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    kernels = {}
    for variant in variants():
        kernel = compiled(variant)
        cubin = kernel.asm["cubin"]
        wrong = faults(kernel, disassembled(cubin, folder), variant.instructions)
        if wrong:
            raise SystemExit(f"{variant.name}: {'; '.join(wrong)}")
        kernels[variant.name] = described(variant, kernel)
        (folder / f"{variant.name}.cubin").write_bytes(cubin)
        print(f"{variant.name}: {len(cubin)} bytes, {kernel.metadata.shared} of shared memory", flush=True)
    (folder / "kernel.cubin").unlink()
    manifest = {"schema": 1, "triton": TRITON, "architecture": 90, "kernels": kernels}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
