"""The torch-free CPU kernels by themselves: vector functions, conversions, products and the phases of workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from types import ModuleType

import numpy as np
import pytest
import torch
from whitebox.build import load

ULP_BOUNDS = {"exp": 1.0, "sigmoid": 2.5, "tanh": 2.5}
ISAS = ("avx512", "avx2", "generic")


@pytest.fixture(scope="session")
def whitebox() -> ModuleType:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the white-box module with")
    return load()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, whitebox: ModuleType) -> str:
    if request.param not in whitebox.engines():
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize("name", ULP_BOUNDS)
def test_ulp_bound_over_the_whole_float_range(whitebox: ModuleType, isa: str, name: str) -> None:
    # Every 61st of the 2^32 floats: 70 million, all exponents, both signs. FASTGRU_FULL_SWEEP=1 takes every one.
    stride = 1 if os.environ.get("FASTGRU_FULL_SWEEP") == "1" else 61
    worst = whitebox.sweep_f32(isa, name, stride)
    assert worst.error <= ULP_BOUNDS[name], f"{name}({worst.x!r}) is {worst.error} ulp off"


@pytest.mark.parametrize("name", ULP_BOUNDS)
def test_ulp_bound_of_doubles(whitebox: ModuleType, isa: str, name: str) -> None:
    worst = whitebox.sweep_f64(isa, name, 200_000)
    assert worst.error <= ULP_BOUNDS[name], f"{name}({worst.x!r}) is {worst.error} ulp off"


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_special_values(whitebox: ModuleType, isa: str, precision: str) -> None:
    dtype = np.float32 if precision == "f32" else np.float64
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype)
    apply = getattr(whitebox, f"apply_{precision}")
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(apply(isa, "exp", x), np.array([1, 1, np.inf, 0, np.nan], dtype))
        np.testing.assert_array_equal(apply(isa, "sigmoid", x), np.array([0.5, 0.5, 1, 0, np.nan], dtype))
        y = apply(isa, "tanh", x)
    np.testing.assert_array_equal(y, np.array([0, 0, 1, -1, np.nan], dtype))
    assert np.signbit(y[1])
    assert not np.signbit(y[0])


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_half_widens_exactly(whitebox: ModuleType, isa: str, dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    want = torch.from_numpy(bits.view(np.int16)).view(torch_dtype).float().numpy()
    np.testing.assert_array_equal(whitebox.widen(isa, dtype, bits), want)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_narrowing_rounds_as_torch_does(whitebox: ModuleType, isa: str, dtype: str) -> None:
    # Every half, the middle between it and the next, and the floats on either side of both: ties and their neighbours.
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    halves = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(torch_dtype).float()
    middles = (halves.double() + halves.roll(-1).double()).div(2).float()
    around = [torch.nextafter(v, torch.tensor(s)) for v in (halves, middles) for s in (float("inf"), float("-inf"))]
    x = torch.cat([halves, middles, *around])
    got = torch.from_numpy(whitebox.narrow(isa, dtype, x.numpy()).view(np.int16)).view(torch_dtype)
    want = x.to(torch_dtype)
    assert torch.equal(got.isnan(), want.isnan())
    finite = ~want.isnan()
    assert torch.equal(got[finite].view(torch.int16), want[finite].view(torch.int16))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 100, 7), (3, 48, 64), (5, 17, 257), (8, 49, 300), (23, 131, 513)])
def test_product_is_within_the_rounding_bound(
    whitebox: ModuleType, isa: str, shape: tuple[int, int, int], transposed: bool
) -> None:
    m, n, k = shape
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    got = whitebox.gemm(isa, np.ascontiguousarray(a.T) if transposed else a, b, transposed)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = k * np.finfo(np.float32).eps * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    assert (np.abs(got - exact) <= bound).all()


def test_a_row_of_a_product_does_not_depend_on_the_others(whitebox: ModuleType, isa: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((19, 300), np.float32), rng.standard_normal((300, 200), np.float32)
    whole = whitebox.gemm(isa, a, b, False)
    for rows in (1, 2, 3, 4, 5, 7, 8, 11):
        np.testing.assert_array_equal(whitebox.gemm(isa, a[:rows], b, False), whole[:rows])
    np.testing.assert_array_equal(whitebox.gemm(isa, np.ascontiguousarray(a.T), b, True), whole)


@pytest.mark.parametrize(("workers", "late"), [(1, []), (2, []), (2, [0]), (3, [1, 2]), (8, []), (8, [0, 3, 7])])
@pytest.mark.parametrize("items", [1, 2, 7, 33])
def test_phases_run_every_item_once_and_in_order(
    whitebox: ModuleType, workers: int, late: list[int], items: int
) -> None:
    assert whitebox.phase_violations(workers, 60, items, late, 0.01, False) == 0


def test_phases_need_no_second_thread(whitebox: ModuleType) -> None:
    # A nested parallel region runs its workers one after the other on one thread.
    assert whitebox.phase_violations(4, 100, 9, [], 0.0, True) == 0


MILLISECOND = 1_000_000  # ns


def test_a_thread_works_alone_after_a_wait(whitebox: ModuleType) -> None:
    backoff, before = whitebox.Backoff(), whitebox.Backoff.count()
    assert not backoff.alone(2)
    backoff.region_ended(0, 1000)
    assert not backoff.alone(2)
    backoff.region_ended(1000 * MILLISECOND, 1001 * MILLISECOND)
    assert backoff.alone(2)
    assert whitebox.Backoff.count() == before + 1
    # Another number of threads: what was seen with the old one says nothing.
    assert not backoff.alone(3)
    assert not backoff.alone(2)


def test_a_short_wait_counts_the_second_time_in_a_row(whitebox: ModuleType) -> None:
    backoff, before = whitebox.Backoff(), whitebox.Backoff.count()
    assert not backoff.alone(2)
    backoff.region_ended(0, 1000)
    backoff.region_ended(MILLISECOND - 1, MILLISECOND)
    assert whitebox.Backoff.count() == before
    # A pause between two calls, as of a busy machine, hides the wait of the second.
    for _ in range(100):
        backoff.region_ended(MILLISECOND - 1, MILLISECOND)
        if whitebox.Backoff.count() > before:
            break
    assert whitebox.Backoff.count() > before


def test_back_off_can_be_turned_off(whitebox: ModuleType) -> None:
    code = """
        from whitebox.build import load
        backoff = load().Backoff()
        assert not backoff.alone(2)
        backoff.region_ended(0, 1000)
        backoff.region_ended(10**9, 10**9 + 1000)
        assert not backoff.alone(2)
        assert not backoff.count()
    """
    environment = {**os.environ, "FASTGRU_BACKOFF": "0", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
