"""The attention kernels for Hopper, as far as they can be tried without one.

Their source runs on the CPU, barriers and copies included (gluon_emulator.py); it is compiled for sm_90a and its
machine code searched; and the launcher is run against a driver that writes down what it is given.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import re
import runpy
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gluon_emulator as emulator
import pytest
import torch
from torch import Tensor

import fastgru
from fastgru import testing
from fastgru.backends import gluon as backend
from fastgru.backends import measured, registry
from fastgru.ops.attention import arguments, gluon
from fastgru.ops.attention import reference as reference_attention
from fastgru.ops.attention import triton as triton_attention
from fastgru.ops.attention.arguments import Attention
from fastgru.ops.attention.schema import ATTENTION_OPS

ROOT = Path(__file__).resolve().parents[1]
BUILD = runpy.run_path(str(ROOT / "tools" / "build_cubins.py"))
VARIANTS = {variant.name: variant for variant in BUILD["variants"]()}


@pytest.fixture(scope="module")
def common() -> Any:
    return emulator.emulated("attention_sm90.common")


@pytest.fixture(scope="module")
def forward() -> Any:
    return emulator.emulated("attention_sm90.common", "attention_sm90.forward")


def scalars(*numbers: int) -> list[emulator.Scalar]:
    return [emulator.Scalar(number) for number in numbers]


def test_every_tile_is_taken_once_and_the_work_is_balanced(common: Any) -> None:
    for heads, blocks, section, programs in [(1, 1, 1, 1), (6, 5, 4, 7), (7, 3, 3, 4), (64, 16, 9, 132), (2, 3, 2, 6)]:
        tiles = heads * blocks
        seen, work = [], []
        for program in range(min(programs, tiles)):
            here = scalars(program, min(programs, tiles))
            rounds = common.rounds_of(*here, emulator.Scalar(tiles))
            found = [common.tile_of(turn, *here) for turn in scalars(*range(rounds))]
            places = [common.place_of(t, *scalars(heads, blocks, section)) for t in found]
            seen += places
            work.append(sum(block + 1 for _, block in places))
        assert sorted(seen) == [(head, block) for head in range(heads) for block in range(blocks)]
        # A causal tile takes the longer the later its block; nobody has more than one of the longest over the average,
        # but where another section begins.
        assert max(work) <= sum(work) / len(work) + blocks * -(-heads // section)


def test_key_blocks_against_every_pair(common: Any) -> None:
    rows, columns = 4, 3
    for q_length in range(10):
        for k_length in range(10):
            for reach in [*range(-10, 12), 30]:
                limit = [max(0, min(k_length, i + reach)) for i in range(q_length)]
                for i0 in range(0, 12, rows):
                    needed, whole = common.key_blocks(*scalars(i0, rows, q_length, k_length, reach), BLOCK_N=columns)
                    mine = limit[i0 : i0 + rows]
                    assert needed == -(-max(mine, default=0) // columns)
                    assert whole == min(mine, default=0) // columns


def attention(a: Attention, kernel: Any, programs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and statistics, by the kernel's source, launched as the backend launches it."""
    variant = VARIANTS[gluon._name(a)]
    output = torch.full_like(arguments.empty_like_layout(a.query, a.value.size(3)), math.nan)
    lse, statistics = (torch.full(shape, math.nan) for shape in (a.query.shape[:3], (2, *a.query.shape[:3])))
    emulator.launch_variant(variant, kernel, gluon.arguments_of(a, output, lse, statistics), programs, seed=seed)
    return output, lse, statistics


COLUMNS = [64, 128, 256]
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, whole blocks": {"Lq": 256, "Lk": 512},
    "one of each": {"B": 1, "Hq": 1, "Hk": 1, "Lq": 1, "Lk": 1},
    "causal": {"right": 0, "Lq": 300, "Lk": 300},
    "causal, more keys": {"right": 0, "Lq": 130, "Lk": 400},
    "causal, more queries": {"right": 0, "Lq": 300, "Lk": 70},
    "causal, top left": {"right": 0, "bottom_right": False, "Lq": 70, "Lk": 300},
    "to the right": {"right": 100, "Lq": 200, "Lk": 500},
    "lengths": {"q_lengths": [200, 0], "k_lengths": [0, 131]},
    "lengths, causal": {"q_lengths": [37, 201], "k_lengths": [259, 130], "right": 0},
    "causal, many blocks": {"right": 0, "Lq": 260, "Lk": 520},
    "float16": {"dtype": torch.float16, "k_lengths": [300, 17]},
    "heads last": {"heads_last": True, "right": 0},
}


def problem(case: dict[str, Any]) -> Attention:
    get = {"B": 2, "Hq": 2, "Hk": 1, "Lq": 201, "Lk": 300, "D": 64, "dtype": torch.bfloat16, **case}

    def draw(heads: int, length: int) -> Tensor:
        if get.get("heads_last"):
            return torch.randn(get["B"], length, heads, get["D"]).to(get["dtype"]).transpose(1, 2)
        return torch.randn(get["B"], heads, length, get["D"]).to(get["dtype"])

    q_lengths, k_lengths = (torch.tensor(get[name]) if name in get else None for name in ("q_lengths", "k_lengths"))
    key, value = draw(get["Hk"], get["Lk"]), draw(get["Hk"], get["Lk"])
    return Attention(
        draw(get["Hq"], get["Lq"]), key, value, None, None, q_lengths, k_lengths, None, None, 0.0,
        get["D"] ** -0.5, 0.0, -1, get.get("right", -1), get.get("bottom_right", True),
    )  # fmt: skip


def exact(a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and statistics, these as the GPU backends mean them."""
    output, lse, statistics = reference_attention.attention(
        *(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in a)
    )
    statistics[0] /= a.scale
    return output, lse, statistics


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name: str, columns: int, forward: Any) -> None:
    a = problem({**CASES[name], "D": columns})
    assert gluon.why_not(a) is None or gluon.manifest() is None
    want, want_lse, want_statistics = exact(a)
    output, lse, statistics = attention(a, forward.attention_forward, programs=5)
    assert torch.equal(lse.isinf(), want_lse.isinf()) and not lse.isnan().any() and not output.isnan().any()
    assert not output[want_lse.isinf()].any()
    # torch's operator has no lengths: its error is that of all queries and keys.
    theirs = torch.softmax((a.query @ a.key.mT.repeat_interleave(a.group, 1)) * a.scale, -1)
    usual = theirs @ a.value.repeat_interleave(a.group, 1)
    plain = exact(a._replace(q_lengths=None, k_lengths=None, window_right=-1))[0]
    limit = testing.error_limit((usual - plain).abs().max().item(), want.abs().max().item(), a.query.dtype)
    assert (output - want).abs().max() <= limit
    assert (lse - want_lse).masked_fill(want_lse.isinf(), 0).abs().max() < 1e-5
    torch.testing.assert_close(statistics.double(), want_statistics, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(backend._available() is not None, reason="needs a Hopper GPU and the kernels of a CUDA wheel")
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_emulated(name: str, columns: int, forward: Any) -> None:
    a = problem({**CASES[name], "D": columns})
    want = attention(a, forward.attention_forward, programs=5)
    given = [t.cuda() if isinstance(t, Tensor) else t for t in a]
    with fastgru.use_backend("gluon"):
        for _ in range(20):
            got = ATTENTION_OPS["gluon"].forward(*given)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=0.01, atol=0.003)
    assert all(torch.equal(*pair) for pair in zip(got, ATTENTION_OPS["gluon"].forward(*given), strict=True))


@pytest.mark.parametrize("columns", COLUMNS)
def test_hidden_nan_and_infinity(columns: int, forward: Any) -> None:
    a = problem({"right": 0, "k_lengths": [290, 160], "Lq": 201, "Lk": 300, "D": columns})
    usual, usual_lse, _ = attention(a, forward.attention_forward, programs=3)
    odd = a._replace(key=a.key.clone(), value=a.value.clone())
    odd.key[0, :, 290:], odd.value[0, :, 290:] = math.nan, math.inf
    odd.key[1, :, 150:], odd.value[1, :, 150:] = math.nan, math.nan
    output, lse, _ = attention(odd, forward.attention_forward, programs=3)
    seen = torch.ones(2, 201, dtype=torch.bool)
    # In the second sequence, whose last 10 keys of 160 are odd, the last 10 queries see one of them.
    seen[1, 191:] = False
    # A block with odd values is summed in another order.
    torch.testing.assert_close(output.transpose(1, 2)[seen], usual.transpose(1, 2)[seen], rtol=0.01, atol=0.005)
    assert torch.equal(lse.transpose(1, 2)[seen], usual_lse.transpose(1, 2)[seen])
    assert output[1, :, 191:].isnan().all()


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_same_bits_in_any_order(columns: int, forward: Any) -> None:
    """However the partitions and the copies take turns, and however many programs there are."""
    a = problem({"B": 1, "right": 0, "Lq": 700, "Lk": 900, "D": columns})
    want, _, _ = exact(a)
    first = attention(a, forward.attention_forward, programs=3)
    assert (first[0] - want).abs().max() < 0.03
    for seed in range(1, 9):
        other = attention(a, forward.attention_forward, programs=2 + seed % 3, seed=seed)
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


OUTER, MIDDLE, INNER = ("\n" + count * " " for count in (8, 12, 16))
WAIT_K, FREE_K = "s = warpgroup_mma_wait(1, deps=[s])", "mbarrier.arrive(k_empty.index(k_slot))"
WAIT_Q, POST = "mbarrier.wait(q_empty.index(slot), (turn // Q_STAGES & 1) ^ 1)", "post(places.index(slot), place)"
FETCH_Q = "tma.async_load(q_desc, [b, h, i0 + who * ROWS, 0], q_full.index(slot), q_ring.index(slot))"
EXPECT_Q = "mbarrier.expect(q_full.index(slot), q_desc.nbytes_per_cta)"
WAIT_V, FREE_V = "acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])", "mbarrier.arrive(v_empty.index(slot))"

#: What, in the kernel, a mistake would look like: each is noticed.
MISTAKES = {
    "phase of q": (
        "mbarrier.wait(q_full.index(q_slot), turn // Q_STAGES & 1)",
        "mbarrier.wait(q_full.index(q_slot), 0)",
    ),
    "phase of k": ("(k_full.index(k_slot), (done + 1) // STAGES & 1)", "(k_full.index(k_slot), 1)"),
    "place told early": (WAIT_Q + MIDDLE + POST, POST + MIDDLE + WAIT_Q),
    "place told late": (MIDDLE.join([POST, EXPECT_Q, FETCH_Q]), MIDDLE.join([EXPECT_Q, FETCH_Q, POST])),
    "producer's phase": ("(use // STAGES & 1) ^ 1)", "(use // STAGES & 1))"),
    "no wait for v": (f"{INNER}mbarrier.wait(v_full.index(slot), done // STAGES & 1)", ""),
    "k released early": (WAIT_K + INNER + FREE_K, FREE_K + INNER + WAIT_K),
    "v released early": (WAIT_V + INNER + FREE_V, FREE_V + INNER + WAIT_V),
    "k not released": (INNER + FREE_K, ""),
    "turn not passed on": (f"{INNER}mbarrier.arrive(order.index(1 - WHO))", ""),
    "both go first": ("(issues & 1) ^ (1 - WHO)", "(issues & 1) ^ 1"),
    "result not awaited": (WAIT_K, WAIT_K.replace("1", "2")),
    "no fence": (f"{OUTER}fence_async_shared()", ""),
    "q released early": (f"{OUTER}tma.store_wait(0)", ""),
    "one warpgroup counted": ("init(k_empty.index(n), count=2)", "init(k_empty.index(n), count=1)"),
    "mask off by one": ("right + 1 + gl", "right + gl"),
    "blocks not masked": ("needed - whole)", "0 * needed)"),
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name: str, columns: int) -> None:
    """In the kernels' barriers and bounds: the tests above would not pass with any of them."""
    wrong = emulator.emulated("attention_sm90.common", "attention_sm90.forward", changes=dict([MISTAKES[name]]))
    shape = {"B": 1, "right": 0, "bottom_right": False, "Lq": 1100, "D": columns}
    # Many blocks of keys to a tile, and one: then the producer is far ahead.
    problems = [problem({**shape, "Lk": keys}) for keys in (1000, 40)]
    wants = [exact(a)[0] for a in problems]

    def noticed(seed: int) -> bool:
        a, want = problems[seed % 2], wants[seed % 2]
        try:
            output, _, _ = attention(a, wrong.attention_forward, programs=3, seed=seed // 2)
        except emulator.KernelError:
            return True
        return not (output - want).abs().max() < 0.03

    assert any(noticed(seed) for seed in range(36))


pinned = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.import_module("triton").__version__ != BUILD["TRITON"],
    reason=f"needs Triton {BUILD['TRITON']}, which the kernels are compiled with",
)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return {}


def test_one_pin() -> None:
    assert f"triton=={BUILD['TRITON']}" in (ROOT / "pyproject.toml").read_text()


@pinned
@pytest.mark.parametrize("name", [f"attention_forward_bfloat16_{columns}" for columns in COLUMNS])
def test_compiles_to_what_is_meant(name: str, compiled: dict[str, Any], tmp_path: Path) -> None:
    kernel = compiled[name] = BUILD["compiled"](VARIANTS[name])
    code = BUILD["disassembled"](kernel.asm["cubin"], tmp_path)
    assert BUILD["faults"](kernel, code) == []
    # The gate itself: what it must refuse.
    assert any("spills" in one for one in BUILD["faults"](kernel, code + " STL [R1], R2 ;"))
    assert any("UTMALDG" in one for one in BUILD["faults"](kernel, code.replace("UTMALDG", "LDG")))
    assert any("gsb0" in one for one in BUILD["faults"](kernel, code.replace("gsb0, 0x1", "gsb0, 0x0")))


DRIVER = r"""
#include <cuda.h>
#include <stdio.h>
#include <string.h>
static FILE* out;
static int sizes[256], count;
extern "C" {
void expect(const char* path, int n, const int* given) {
  out = fopen(path, "wb"), count = n;
  memcpy(sizes, given, n * sizeof(int));
}
int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = (void*)(long)(7000 + device); return 0; }
CUresult cuModuleLoadData(CUmodule* m, const void*) { *m = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
  *f = (CUfunction)2;
  return strcmp(name, "absent") ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetErrorString(CUresult, const char** words) { *words = "named symbol not found"; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute a, int bytes) {
  fprintf(stderr, "attribute %d = %d\n", a, bytes);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
    CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  // What was asked for, where a descriptor would be: address, 4 sizes, 3 strides, 4 sizes of the box, type and swizzle.
  unsigned long long* to = (unsigned long long*)map;
  *to++ = (unsigned long long)address;
  for (int n = 0; n < 4; ++n) *to++ = dims[n];
  for (int n = 0; n < 3; ++n) *to++ = strides[n];
  for (int n = 0; n < 4; ++n) *to++ = box[n];
  *to++ = type;
  *to++ = swizzle;
  return rank == 4 && steps[0] == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernel(CUfunction, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                        unsigned shared, CUstream stream, void** parameters, void**) {
  fprintf(stderr, "launch %u %u %u %u %u %u %u %ld\n", x, y, z, tx, ty, tz, shared, (long)stream);
  if (out == nullptr) return CUDA_SUCCESS;
  for (int n = 0; n < count; ++n) fwrite(parameters[n], 1, sizes[n], out);
  fclose(out);
  out = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty,
                                   unsigned tz, unsigned shared, CUstream stream, void** parameters) {
  fprintf(stderr, "cooperative ");
  return cuLaunchKernel(f, x, y, z, tx, ty, tz, shared, stream, parameters, 0);
}
}
"""
REGISTRATION = r"""
#include <torch/csrc/stable/library.h>
#include "cuda/cubin_launch.h"
STABLE_TORCH_LIBRARY(fastgru_launch_test, m) {
  m.def("load(str path, str symbol, int device, int shared) -> ()");
  m.def("launch(Tensor(a!)[] tensors, str path, str symbol, int device, int programs, bool cooperative, "
        "int threads, int shared, int[] plan, float[] numbers) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgru_launch_test, CompositeExplicitAutograd, m) {
  m.impl("load", TORCH_BOX(&fastgru::cuda_load));
  m.impl("launch", TORCH_BOX(&fastgru::cuda_launch));
}
"""


@pinned
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_launcher_passes_what_the_kernel_takes(compiled: dict[str, Any], tmp_path: Path) -> None:
    """Of the sizes that the cubin itself tells, in the order of the kernel's source."""
    name = "attention_forward_bfloat16_64"
    kernel = compiled.get(name) or BUILD["compiled"](VARIANTS[name])
    nvidia = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([nvidia / "bin" / "cuobjdump", "-elf", cubin], capture_output=True, text=True, check=True)
    found = re.findall(r"Ordinal : (0x\w+)\s+Offset\s+: (0x\w+)\s+Size\s+: (0x\w+)", listing.stdout)
    sizes = [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, _, size in found)]

    entry = BUILD["described"](VARIANTS[name], kernel)
    a = problem({"Lq": 130, "Lk": 70, "right": 3, "heads_last": True, "k_lengths": [3, 4]})
    output, lse = torch.empty(2, 130, 2, 64, dtype=torch.bfloat16).transpose(1, 2), torch.empty(2, 2, 130)
    tensors, numbers = gluon.arguments_of(a, output, lse, torch.empty(2, 2, 2, 130))
    given, plan, floats = gluon.plan_of(entry, tensors, numbers)

    (tmp_path / "driver.cpp").write_text(DRIVER)
    (tmp_path / "registration.cpp").write_text(REGISTRATION)
    flags = ["g++", "-shared", "-fPIC", "-std=c++17", "-O0", f"-I{nvidia / 'include'}"]
    driver = tmp_path / "libcuda.so.1"
    subprocess.run([*flags, "-Wl,-soname,libcuda.so.1", tmp_path / "driver.cpp", "-o", driver], check=True)
    library = tmp_path / "launch.so"
    flags += [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    own = [ROOT / "csrc" / "cuda" / name for name in ("cubin_launch.cpp", "stream.cpp")]
    sources = [tmp_path / "registration.cpp", *own]
    linked = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run([*flags, *sources, *linked, "-o", library], check=True)
    torch.save({"given": given, "plan": plan, "floats": floats, "sizes": sizes}, tmp_path / "launch.pt")
    program = f"""
import ctypes, torch
driver = ctypes.CDLL({str(driver)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
saved = torch.load({str(tmp_path / "launch.pt")!r})
sizes = saved["sizes"]
driver.expect({str(tmp_path / "parameters").encode()!r}, len(sizes), (ctypes.c_int * len(sizes))(*sizes))
print(*[t.data_ptr() for t in saved["given"]])
ops = torch.ops.fastgru_launch_test
cubin = {str(cubin)!r}
how = (False, {entry["threads"]}, {entry["shared"]}, saved["plan"], saved["floats"])
ops.launch(saved["given"], cubin, "attention_forward", 1, 5, *how)
ops.launch(saved["given"], cubin, "attention_forward", 1, 6, True, *how[1:])
for arguments in ((cubin, "absent", 0, 1), ("/nowhere", "x", 0, 1)):
    try:
        ops.load(*arguments)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    addresses, absent, unreadable = done.stdout.strip().splitlines()
    assert "the kernel is not in its file: named symbol not found" in absent and "cannot read /nowhere" in unreadable
    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES is 8; the stream is that of device 1.
    assert f"attribute 8 = {entry['shared']}" in done.stderr
    assert f"launch 5 1 1 384 1 1 {entry['shared']} 7001" in done.stderr.splitlines()
    assert f"cooperative launch 6 1 1 384 1 1 {entry['shared']} 7001" in done.stderr.splitlines()

    raw = (tmp_path / "parameters").read_bytes()
    parameters = [raw[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(len(sizes))]
    place = dict(zip([id(t) for t in given], map(int, addresses.split()), strict=True))
    source = emulator.emulated("attention_sm90.common", "attention_sm90.forward").attention_forward
    for parameter in inspect.signature(source).parameters:
        if parameter in VARIANTS[name].constants:
            continue
        first, *parameters = parameters
        if parameter in VARIANTS[name].maps:
            t = tensors[parameter]
            box = VARIANTS[name].maps[parameter]
            words = struct.unpack("14Q", first[: 14 * 8])
            assert len(first) == 128 and words[0] == place[id(t)]
            assert words[1:5] == tuple(reversed(t.shape))
            assert words[5:8] == tuple(2 * stride for stride in reversed(t.stride()[:3]))
            # 64 columns of bfloat16 are the 128 bytes of the swizzle (3); 9 is bfloat16.
            assert words[8:] == (64, box[2], 1, 1, 9, 3)
            shape, strides, parameters = parameters[:4], parameters[4:8], parameters[8:]
            assert [struct.unpack("i", one)[0] for one in shape] == list(t.shape)
            assert [struct.unpack("q", one)[0] for one in strides] == list(t.stride())
        elif parameter in tensors:
            t = tensors[parameter]
            assert struct.unpack("Q", first)[0] == (0 if t is None else place[id(t)])
        else:
            assert struct.unpack("f" if parameter == "scale" else "i", first)[0] == pytest.approx(numbers[parameter])
    # Triton's two pointers to scratch memory.
    assert parameters == [bytes(8), bytes(8)]


def test_what_it_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "manifest", lambda: dict.fromkeys(VARIANTS))
    a = problem({})
    assert gluon.why_not(a) is None
    for change, words in (
        ({"bias": torch.zeros(1, 1, 1, 1)}, "a bias"),
        ({"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "a mask"),
        ({"dropout_seed": torch.tensor(1)}, "dropout"),
        ({"alibi_slopes": torch.zeros(1, 2)}, "ALiBi"),
        ({"softcap": 1.0, "window_left": 3}, "softcap, a window to the left"),
        ({"scale": -1.0}, "a scale that is not within"),
        ({"scale": 1e31}, "a scale that is not within"),
        ({"query": a.query.float()}, "torch.float32"),
        ({"query": a.query[..., :40], "key": a.key[..., :40]}, "40 and 64"),
        ({"query": a.query[:, :, :0]}, "empty"),
    ):
        reason = gluon.why_not(a._replace(**change))
        assert reason is not None and words in reason


def test_strides_for_tma() -> None:
    t = torch.randn(2, 3, 5, 64, dtype=torch.bfloat16)
    assert gluon.for_tma(t).data_ptr() == t.data_ptr()
    last = t.permute(0, 2, 1, 3)
    assert gluon.for_tma(last).data_ptr() == t.data_ptr() and gluon.for_tma(last).stride() == last.stride()
    wide = torch.randn(2, 3, 5, 66, dtype=torch.bfloat16)
    for odd in (
        t.mT.contiguous().mT,
        wide[..., :64],
        t.flatten()[1:-63].view(-1, 1, 1, 64)[:4],
        t[:, :1].expand(2, 3, 5, 64),
    ):
        fresh = gluon.for_tma(odd)
        assert torch.equal(fresh, odd) and fresh.data_ptr() % 16 == 0
        assert all(stride > 0 and stride % 8 == 0 for stride in fresh.stride()[:3]) and fresh.stride(3) == 1
    one = t[:1, :1].as_strided((1, 1, 5, 64), (3, 0, 64, 1))
    assert gluon.for_tma(one).stride() == (8, 8, 64, 1)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    def write(rows: list[list[float]]) -> None:
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"measured": {"sm_90": {"bfloat16": rows}}}))
        monkeypatch.setattr(gluon, "TABLE", path)
        gluon._measured.cache_clear()

    monkeypatch.setattr(measured, "architecture", lambda device: "sm_90")
    yield write
    gluon._measured.cache_clear()


def test_auto_goes_by_measurements(table: Any) -> None:
    assert json.loads(gluon.TABLE.read_text())["columns"] == [
        "D", "L", "causal", "gluon_us", "triton_us", "gluon.backward_us", "triton.backward_us"
    ]  # fmt: skip
    table([[64, 1024, 0, 1, 2, 2, 1], [64, 8192, 0, 3, 2, 2, 3], [64, 1024, 1, 2, 1, None, 1]])
    for case, ahead in (
        ({"Lk": 1500}, True),
        ({"Lk": 5000}, False),
        ({"Lk": 300}, False),
        ({"Lk": 1024, "right": 0}, False),
    ):
        assert gluon.is_faster(problem(case)) == ahead
    assert [gluon.is_faster(problem({"Lk": length}), backward=True) for length in (1500, 5000, 300)] == [
        False,
        True,
        False,
    ]
    assert not gluon.is_faster(problem({"D": 128, "Lk": 1024}))
    on_cpu = gluon.Pass(problem({"Lk": 1024}), False), gluon.Pass(problem({"Lk": 1024}), True)
    assert not any(gluon.wins(torch.device("cpu"), torch.bfloat16, one) for one in on_cpu)


def test_a_launch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(a: Attention) -> None:
        raise RuntimeError("the kernel does not load: no kernel image")

    a = problem({"Lq": 3, "Lk": 4})
    monkeypatch.setattr(gluon, "manifest", lambda: dict.fromkeys(VARIANTS))
    monkeypatch.setattr(gluon, "_launch", fail)
    monkeypatch.setattr(gluon, "_broken", [])
    monkeypatch.setattr(triton_attention, "attention", reference_attention.attention)
    with fastgru.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match="no kernel image"):
            output, _, _ = gluon.attention(*a)
        # Said once, and not tried again: a second warning would be an error.
        again, _, _ = gluon.attention(*a)
    assert torch.equal(output, reference_attention.attention(*a)[0]) and torch.equal(output, again)
    monkeypatch.setattr(registry._process, "name", "gluon")
    with pytest.raises(fastgru.BackendUnavailable, match="no kernel image"):
        gluon.attention(*a)
    with pytest.raises(fastgru.BackendUnavailable, match="a window to the left"):
        gluon.attention(*a._replace(window_left=3))


def test_by_name_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gluon: not used" in fastgru.explain("cuda", torch.bfloat16) or torch.cuda.is_available()
    if not torch.cuda.is_available():
        with pytest.raises(fastgru.BackendUnavailable, match="'gluon' cannot run"):
            fastgru.use_backend("gluon")
    # With all in place it is for attention, and has no GRU.
    everywhere = registry.Backend("gluon", ("cpu",), 65, lambda: None, lambda *_: None)
    monkeypatch.setitem(registry._backends, "gluon", everywhere)
    with fastgru.use_backend("auto"):
        assert "gluon: for attention only where it was measured to be faster" in fastgru.explain()
        assert registry.select("gru", "cpu", torch.float32).name != "gluon"
    with fastgru.use_backend("gluon"), pytest.raises(fastgru.BackendUnavailable, match="has no GRU"):
        fastgru.GRU(2, 3)(torch.zeros(1, 1, 2))
