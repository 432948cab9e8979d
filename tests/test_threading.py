"""The C++ backend's results do not depend on threads, on neighbours in the batch, or on who else is calling."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastgru
from fastgru import _library

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))

# (T, B, I, H): shared out by rows of the batch, by hidden units, one row alone, a single step, more workers than items;
# few units, of which a batch is computed by rows, and a part of it by units.
SHAPES = [(20, 40, 48, 64), (6, 9, 100, 257), (30, 1, 33, 260), (1, 37, 300, 200), (7, 3, 5, 16)]
SHAPES += [(5, 330, 20, 7), (1, 330, 20, 7), (12, 150, 128, 1)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[] if _library.load_error else torch.ops.fastgru.cpu_isas().split(","))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.fastgru.cpu_isa()
    torch.ops.fastgru.cpu_set_isa(request.param)
    yield request.param
    torch.ops.fastgru.cpu_set_isa(before)


def _run(module: fastgru.GRU, x: Tensor, hx: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Outputs and every gradient."""
    x, hx = x.clone().requires_grad_(), hx.clone().requires_grad_()
    inputs = [x, hx, *module.parameters()]
    output, h_n = module(x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    y = output if lengths is None else output.data
    grads = torch.autograd.grad((y * y.detach().cos()).sum() + h_n.square().sum(), inputs)
    return [y.detach(), h_n.detach(), *grads]


def _problem(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[fastgru.GRU, Tensor, Tensor]:
    torch.manual_seed(seed)
    T, B, I, H = shape
    module = fastgru.GRU(I, H, bidirectional=True, dtype=dtype)
    return module, torch.randn(T, B, I, dtype=dtype), torch.randn(2, B, H, dtype=dtype)


def _assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, packed: bool
) -> None:
    module, x, hx = _problem(shape, dtype)
    lengths = torch.randint(1, shape[0] + 1, (shape[1],)) if packed else None
    torch.set_num_threads(1)
    want = _run(module, x, hx, lengths)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        _assert_same(_run(module, x, hx, lengths), want)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module, x, hx = _problem(shape, dtype)
    torch.set_num_threads(2)
    y, h_n, dx, dh0, *_ = _run(module, x, hx)
    batch = shape[1]
    for first, last in {(0, 1), (0, (batch + 1) // 2), (batch // 3, batch), (batch - 1, batch)}:
        rows = slice(first, last)
        part = _run(module, x[:, rows], hx[:, rows])
        _assert_same(part[:4], [y[:, rows], h_n[:, rows], dx[:, rows], dh0[:, rows]])


def test_one_instruction_set_reads_what_another_saved() -> None:
    for shape in ((9, 3, 20, 37), (9, 3, 20, 5), (9, 53, 20, 5)):
        _read_what_another_saved(shape)


def _read_what_another_saved(shape: tuple[int, ...]) -> None:
    module, x, hx = _problem(shape, torch.float32)
    x.requires_grad_()
    before = torch.ops.fastgru.cpu_isa()
    want = torch.autograd.grad(module(x, hx)[0].square().sum(), x)[0]
    names = torch.ops.fastgru.cpu_isas().split(",")
    try:
        for forward, backward in itertools.permutations(names, 2):
            torch.ops.fastgru.cpu_set_isa(forward)
            loss = module(x, hx)[0].square().sum()
            torch.ops.fastgru.cpu_set_isa(backward)
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, rtol=1e-4, atol=1e-5)
    finally:
        torch.ops.fastgru.cpu_set_isa(before)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_row_of_nan_stays_alone(isa: str, steps: int) -> None:
    module, x, hx = _problem((steps, 40, 6, 3), torch.float32)
    y, h_n, dx, dh0, *_ = _run(module, x, hx)
    x[0, 17, 2], hx[:, 30] = torch.nan, torch.inf
    others = [row for row in range(40) if row not in (17, 30)]
    broken = _run(module, x, hx)
    _assert_same([t[:, others] for t in broken[:4]], [t[:, others] for t in (y, h_n, dx, dh0)])
    assert broken[0][:, 17].isnan().any()


def test_calls_from_several_python_threads() -> None:
    torch.set_num_threads(2)
    problems = [_problem(SHAPES[i % len(SHAPES)], torch.float32, seed=i) for i in range(4)]
    want = [_run(*problem) for problem in problems]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            got = _run(*problems[index])
            if not all(torch.equal(a, b) for a, b in zip(got, want[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_strides_beyond_32_bits(isa: str, tmp_path: Path) -> None:
    # Two steps of the input lie more than 2^31 elements apart, in a file of which all but a few pages are holes.
    stride = 2**31 + 8
    far = torch.from_file(str(tmp_path / "x"), shared=True, size=stride + 64, dtype=torch.bfloat16)
    module = fastgru.GRU(8, 24, dtype=torch.bfloat16)
    x, hx = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.zeros(1, 3, 24, dtype=torch.bfloat16)
    view = far.as_strided(x.shape, (stride, 8, 1))
    view.copy_(x)
    with torch.no_grad():
        _assert_same(list(module(view, hx)), list(module(x, hx)))
    want = torch.autograd.grad(module(x, hx)[0].sum(), module.weight_ih_l0)
    _assert_same(list(torch.autograd.grad(module(view, hx)[0].sum(), module.weight_ih_l0)), list(want))


FORK = """
        import signal, threading
        from torch.nn.utils.rnn import pack_padded_sequence
        torch.set_num_threads(2)
        two, rows = fastgru.GRU(48, 100, 2, bidirectional=True), pack_padded_sequence(x, [12, 12, 9, 4, 1])
        q = torch.randn(1, 4, 100, 64, requires_grad=True)
        # The short way and the operators, forward and backward, all of it worth two threads.
        def everything():
            found = [run()]
            with torch.no_grad():
                found += [module(x)[0], two(rows)[0].data, fastgru.scaled_dot_product_attention(q, q, q)]
            for output, leaf in (
                (two(rows)[0].data, two.weight_hh_l1),
                (fastgru.scaled_dot_product_attention(q, q, q), q),
                (fastgru.flash_attention(q, q, q, window=(90, 5)), q),
            ):
                found += torch.autograd.grad(output, leaf, torch.ones_like(output))
            return found
        def same(got, want):
            return all((a.detach().numpy() == b.detach().numpy()).all() for a, b in zip(got, want, strict=True))
        def in_a_child(work):
            child = os.fork()
            if child == 0:
                signal.alarm(40)
                os._exit(0 if work() else 1)
            return os.waitpid(child, 0)[1] == 0
"""

PROGRAMS = {
    # OpenMP's pool does not come through a fork. (Torch's own operators would wait for it, if their tensors are large.)
    "fork": FORK
    + """
        want = everything()
        assert in_a_child(lambda: same(everything(), want)), "child"
        assert in_a_child(lambda: in_a_child(lambda: same(everything(), want))), "child of a child"
        started = []
        def in_a_thread():
            thread = threading.Thread(target=lambda: started.append(same(everything(), want)))
            thread.start()
            thread.join()
            return started == [True]
        assert in_a_child(in_a_thread), "thread of a child"
        assert same(everything(), want), "parent, after the forks"
    """,
    "fork in the middle of another thread's region": FORK
    + """
        want, stop = everything(), threading.Event()
        def work():
            with torch.no_grad():
                while not stop.is_set():
                    module(x)
        thread = threading.Thread(target=work)
        thread.start()
        done = [in_a_child(lambda: same(everything(), want)) for _ in range(5)]
        stop.set()
        thread.join()
        assert all(done), done
    """,
    "workers of a DataLoader": FORK
    + """
        want = everything()
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return same(everything(), want)
        loader = torch.utils.data.DataLoader(
            Data(), num_workers=2, timeout=60, multiprocessing_context="fork",
            worker_init_fn=lambda _: torch.set_num_threads(2))
        assert all(bool(flag) for batch in loader for flag in batch)
    """,
    # Long enough that some calls wait for the core that is taken, and the next ones work alone.
    "a neighbour on a core": """
        torch.set_num_threads(1)
        want = run()
        torch.set_num_threads(2)
        core = max(os.sched_getaffinity(0))
        spin = f"import os; os.sched_setaffinity(0, [{core}]); any(iter(int, 1))"
        neighbour = subprocess.Popen([sys.executable, "-c", spin])
        try:
            assert all(torch.equal(run(), want) for _ in range(300))
        finally:
            neighbour.kill()
            neighbour.wait()
    """,
    # After a pause the pool is asleep; a thread that wakes up on the caller's core goes to another one, for which it
    # changes its affinity for a moment.
    "pauses": """
        import time
        from pathlib import Path
        def affinities():
            return {task.name: os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()}
        torch.set_num_threads(2)
        want = run()
        before = affinities()
        assert len(before) > 1
        for _ in range(50):
            time.sleep(0.01)
            assert torch.equal(run(), want)
        assert affinities() == before
    """,
    # As an extension does that parallelises over problems: every thread of OpenMP's calls the layer, whose own region
    # is then nested, and runs on that thread alone.
    "inside another parallel region": """
        import ctypes
        want, got = run(), []
        loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
        region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: got.append(run()))
        ctypes.CDLL(loaded.pop()).GOMP_parallel(region, None, 3, 0)
        assert len(got) == 3 and all(torch.equal(grad, want) for grad in got)
    """,
    "more threads than cores": """
        want = run()
        torch.set_num_threads(4 * os.cpu_count() + 1)
        assert all(torch.equal(run(), want) for _ in range(20))
    """,
    "out of memory": """
        import resource
        want = run()
        layer = fastgru.GRU(8, 8)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
        try:
            with torch.no_grad():
                layer(torch.zeros(1, 1, 8).expand(4_000_000, 1, 8))
        except RuntimeError as error:
            assert "can't allocate memory" in str(error), error
        else:
            raise AssertionError("there was enough memory")
        assert torch.equal(run(), want)
    """,
    # What a thread keeps for its next call, while it waits for something else.
    "scratch memory given back": """
        import resource, threading
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        layer, wide = fastgru.GRU(512, 512), torch.randn(8, 64, 512)
        called, done = threading.Event(), threading.Event()
        def work():
            with torch.no_grad():
                layer(wide)
                layer(wide)  # the second call finds how much the first one needed
            called.set()
            done.wait()
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        called.wait()
        want, before = run(), resident()
        torch.ops.fastgru.cpu_release_memory()
        assert before - resident() > 3 * 512 * 1024 * 4
        assert torch.equal(run(), want)
        done.set()
        thread.join()
        torch.ops.fastgru.cpu_release_memory()
        assert torch.equal(run(), want)
    """,
    "one OpenMP thread": """
        assert torch.get_num_threads() == 1
        run()
    """,
    "a limit below what was asked for": """
        torch.set_num_threads(8)
        run()
    """,
}
for name in ("threads stay where they are", "threads bound by OpenMP"):
    PROGRAMS[name] = PROGRAMS["pauses"]
ENVIRONMENT = {
    "threads stay where they are": {"FASTGRU_MOVE_THREADS": "0"},
    "threads bound by OpenMP": {"OMP_PROC_BIND": "true"},
    "one OpenMP thread": {"OMP_NUM_THREADS": "1"},
    "a limit below what was asked for": {"OMP_THREAD_LIMIT": "1"},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_a_process_of_its_own(name: str) -> None:
    prologue = """
        import os, subprocess, sys, torch, fastgru
        torch.manual_seed(0)
        module, x = fastgru.GRU(48, 160), torch.randn(12, 5, 48)
        def run():
            output, _ = module(x)
            return torch.autograd.grad(output.square().sum(), module.weight_hh_l0)[0]
    """
    code = textwrap.dedent(prologue) + textwrap.dedent(PROGRAMS[name])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ENVIRONMENT.get(name, {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
