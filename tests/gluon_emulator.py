"""Runs Gluon kernels on the CPU: Triton's interpreter does not.

The source of the kernels runs as Python, with this module in the place of Gluon. What makes such kernels hard is kept:
the partitions of a warp-specialised kernel run side by side, in an order drawn at random at every barrier and copy;
barriers count arrivals and bytes and have phases; TMA copies and wgmma take effect late. Shared memory starts as NaN
and is NaN again while a copy into it is under way. Errors, not just wrong numbers, are: a deadlock, an arrival too
many, a product whose operands change while it runs, a result read before it was waited for, an address out of bounds, a
tile stored by TMA without a fence, a copy still reading when its memory is written.

Not kept: layouts, registers, the order of summation, the exponential's last bits.
"""

from __future__ import annotations

import math
import operator
import random
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


class KernelError(Exception):
    """The kernel did what it must not."""


class Scalar(int):
    """An integer of the kernel: divided as C does, and with Triton's methods."""

    def to(self, dtype: torch.dtype) -> Scalar:
        return self


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _scalar_method(function: Callable[[int, int], int], swap: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        a, b = (int(other), int(self)) if swap else (int(self), int(other))
        return Scalar(function(a, b))

    return method


for _name, _function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "floordiv": _quotient, "mod": lambda a, b: a - _quotient(a, b) * b,
}.items():  # fmt: skip
    setattr(Scalar, f"__{_name}__", _scalar_method(_function, False))
    setattr(Scalar, f"__r{_name}__", _scalar_method(_function, True))


class Tile(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tile:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)


def tile(t: torch.Tensor) -> Tile:
    return t.as_subclass(Tile)


class Pointer:
    """To a tensor without gaps; ``offset`` is a number or a tile."""

    def __init__(self, base: torch.Tensor, offset: Any = 0) -> None:
        assert base.is_contiguous()
        self.base, self.offset = base.view(-1), offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + offset)

    def check(self, mask: Any) -> None:
        offset = torch.as_tensor(self.offset)
        if (((offset < 0) | (offset >= self.base.numel())) & torch.as_tensor(mask)).any():
            raise KernelError("an address is out of bounds")


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    pointer.check(mask)
    if isinstance(pointer.offset, int):
        return Scalar(pointer.base[pointer.offset]) if mask else Scalar(other)
    kept = pointer.base[torch.where(torch.as_tensor(mask), pointer.offset, 0).long()]
    return tile(torch.where(torch.as_tensor(mask), kept, other))


def store(pointer: Pointer, value: torch.Tensor, mask: Any = True) -> None:
    pointer.check(mask)
    chosen = torch.as_tensor(mask).expand(pointer.offset.shape)
    pointer.base[pointer.offset[chosen].long()] = value[chosen].to(pointer.base.dtype).as_subclass(torch.Tensor)


class Shared:
    """Shared memory. ``root`` is the allocation: fences and reading copies are kept there."""

    def __init__(self, data: torch.Tensor, root: dict[str, Any]) -> None:
        self.data, self.root = data, root
        self.dtype, self.shape = data.dtype, list(data.shape)

    def _view(self, data: torch.Tensor) -> Shared:
        return Shared(data, self.root)

    def index(self, n: int) -> Shared:
        return self._view(self.data[n])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self._view(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return self._view(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> Tile:
        return tile(self.data.clone())

    def gather(self, indices: torch.Tensor, axis: int) -> Tile:
        return tile(torch.gather(self.data, axis, indices.long().as_subclass(torch.Tensor)))

    def store(self, value: torch.Tensor) -> None:
        here = self.data.untyped_storage().data_ptr(), self.data.storage_offset()
        if here in [copy.place for copy in machine().copies if copy.reads]:
            raise KernelError("memory is written that a copy still reads")
        self.data.copy_(value)
        self.root["unfenced"] = True


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.arrivals = count
        self.bytes = self.phase = 0

    def arrive(self, bytes_expected: int = 0) -> None:
        if self.count == 0:
            raise KernelError("a barrier is used before it is made")
        if self.arrivals == 0:
            raise KernelError("more arrive at a barrier than it waits for")
        self.arrivals -= 1
        self.bytes += bytes_expected
        self._turn()

    def complete(self, bytes_copied: int) -> None:
        self.bytes -= bytes_copied
        self._turn()

    def _turn(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.arrivals = self.count
            self.phase += 1

    def passed(self, parity: int) -> bool:
        if self.count == 0:
            raise KernelError("a barrier is used before it is made")
        return self.phase % 2 != parity


class Barriers(list[Barrier]):
    def index(self, n: int) -> Barrier:  # type: ignore[override]
        return self[n]


class Descriptor:
    """A TMA descriptor of a 4-D tensor."""

    layout = None

    def __init__(self, data: torch.Tensor, block_shape: list[int]) -> None:
        self.data, self.block_shape, self.dtype = data, block_shape, data.dtype
        self.shape = [Scalar(size) for size in data.shape]
        self.nbytes_per_cta = math.prod(block_shape) * data.element_size()

    def inside(self, place: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a tile that lies in the tensor, as slices of the tensor and of the tile."""
        whole, part = [], []
        for start, length, size in zip(place, self.block_shape, self.data.shape, strict=True):
            first, end = max(0, start), max(0, min(size, start + length))
            whole.append(slice(first, max(first, end)))
            part.append(slice(first - start, max(first, end) - start))
        return tuple(whole), tuple(part)


class Copy:
    """A TMA copy under way."""

    def __init__(self, owner: int, shared: Shared, reads: bool, action: Callable[[], None]) -> None:
        self.owner, self.reads, self.action = owner, reads, action
        self.place = shared.data.untyped_storage().data_ptr(), shared.data.storage_offset()


class Product:
    """A wgmma under way."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Tile | None = None
        self.issued = self._multiply()

    def _multiply(self) -> torch.Tensor:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        return (a.float() @ self.b.data.float()).as_subclass(torch.Tensor)

    def finish(self) -> None:
        product = self._multiply()
        if not torch.equal(product.nan_to_num(7e7), self.issued.nan_to_num(7e7)):
            raise KernelError("the operands of a product changed while it ran")
        self.value = tile(product + finished(self.acc) if self.use_acc else product)


def finished(value: Any) -> Any:
    if isinstance(value, Product):
        if value.value is None:
            raise KernelError("the result of a product is read before it is waited for")
        return value.value
    return value


class Machine:
    """One program: its partitions, as threads of which one runs at a time, and its copies."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = Scalar(program), Scalar(programs)
        self.random = random.Random(seed)
        self.habit, self.late = seed % 3, seed // 3 % 3
        self.roots: list[dict[str, bool]] = []
        self.copies: list[Copy] = []
        self.products: dict[int, list[Product]] = {}
        self.waits: dict[int, Callable[[], bool]] = {}
        self.turns: dict[int, threading.Semaphore] = {}
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self, partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        threads = []
        for who, (function, arguments) in enumerate(partitions):
            self.waits[who] = lambda: True
            self.turns[who] = threading.Semaphore(0)
            self.products[who] = []
            threads.append(threading.Thread(target=self._partition, args=(who, function, arguments), daemon=True))
            threads[-1].start()
        while self.waits and self.error is None:
            ready = [who for who, passed in self.waits.items() if passed()]
            if not ready and not self.copies:
                self.error = KernelError(f"deadlock: partitions {sorted(self.waits)} wait for ever")
                break
            chosen = self._choose(ready)
            if chosen < len(ready):
                self.turns[ready[chosen]].release()
                self.back.acquire()
            else:
                self.copies.pop(chosen - len(ready)).action()
        for who in list(self.waits):
            self.turns[who].release()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        if any(self.products.values()) or any(not copy.reads for copy in self.copies):
            raise KernelError("the kernel ends while something is under way")
        for copy in self.copies:
            copy.action()

    def _choose(self, ready: list[int]) -> int:
        """Of partitions and copies: anything; or copies only when nothing else is left; or one partition only then."""
        if self.habit == 1 and ready:
            return self.random.randrange(len(ready))
        if self.habit == 2:
            others = [n for n in range(len(ready) + len(self.copies)) if n >= len(ready) or ready[n] != self.late]
            return self.random.choice(others or [0])
        return self.random.randrange(len(ready) + len(self.copies))

    def _partition(self, who: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        current.machine, current.who = self, who
        self.turns[who].acquire()
        try:
            if self.error is None:
                function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        del self.waits[who]
        self.back.release()

    def pause(self, passed: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until ``passed``."""
        self.waits[current.who] = passed
        self.back.release()
        self.turns[current.who].acquire()
        if self.error is not None:
            raise KernelError("another partition failed")


current = threading.local()


def machine() -> Machine:
    found: Machine = current.machine
    return found


def wait(barrier: Barrier, phase: int) -> None:
    machine().pause(lambda: barrier.passed(int(phase)))


def arrive(barrier: Barrier) -> None:
    barrier.arrive()
    machine().pause()


def async_load(desc: Descriptor, place: Sequence[int], barrier: Barrier, result: Shared) -> None:
    def finish() -> None:
        whole, part = desc.inside(place)
        result.data.zero_()
        result.data[part] = desc.data[whole]
        barrier.complete(desc.nbytes_per_cta)

    assert result.shape == desc.block_shape
    copy = Copy(current.who, result, False, finish)
    if copy.place in [other.place for other in machine().copies]:
        raise KernelError("memory is written that another copy uses")
    result.data.fill_(math.nan)
    machine().copies.append(copy)
    machine().pause()


def async_store(desc: Descriptor, place: Sequence[int], source: Shared) -> None:
    def finish() -> None:
        whole, part = desc.inside(place)
        desc.data[whole] = source.data[part]

    if source.root["unfenced"]:
        raise KernelError("TMA stores what no fence has made visible to it")
    machine().copies.append(Copy(current.who, source, True, finish))
    machine().pause()


def store_wait(pendings: int) -> None:
    assert pendings == 0
    for copy in [c for c in machine().copies if c.reads and c.owner == current.who]:
        machine().copies.remove(copy)
        copy.action()


def fence_async_shared() -> None:
    for root in machine().roots:
        root["unfenced"] = False


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(finished(a), b, acc, use_acc)
    machine().products[current.who].append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    machine().pause()
    running = machine().products[current.who]
    while len(running) > num_outstanding:
        running.pop(0).finish()
    results = [finished(dep) for dep in deps]
    return results[0] if len(results) == 1 else tuple(results)


def _pairwise(scalar: Callable[[Any, Any], Any], many: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Any]:
    def function(a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return Scalar(scalar(int(a), int(b)))
        return tile(many(torch.as_tensor(a), torch.as_tensor(b)))

    return function


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool):
        return Scalar(a if condition else b)
    return tile(torch.where(condition, a, b))


def full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Tile:
    return tile(torch.full(shape, value, dtype=dtype))


def reduced(t: torch.Tensor) -> Any:
    """Of a reduction: a tile, or an integer of the kernel."""
    return Scalar(t) if t.dim() == 0 and not t.is_floating_point() else tile(t)


def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
    root = {"unfenced": False}
    machine().roots.append(root)
    return Shared(torch.full(shape, math.nan if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype), root)


def _fakes() -> dict[str, types.ModuleType]:
    """The modules that a kernel's source imports."""

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__path__ = []  # type: ignore[attr-defined]
        vars(made).update(content)
        return made

    nothing: dict[str, Any] = dict.fromkeys(
        ("SliceLayout", "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SwizzledSharedLayout"),
        lambda *arguments: None,
    )
    language = module(
        "gl", **nothing, constexpr=lambda value: value, static_range=range, arange=lambda start, end, layout=None:
        tile(torch.arange(start, end, dtype=torch.int32)), full=full,
        zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype), load=load, store=store, where=where,
        minimum=_pairwise(min, torch.minimum), maximum=_pairwise(max, torch.maximum),
        max=lambda x, axis: reduced(x.amax(axis)), sum=lambda x, axis: reduced(x.sum(axis)), exp2=torch.exp2,
        log2=torch.log2, cdiv=lambda a, b: Scalar(_quotient(a + b - 1, b)), barrier=lambda: None,
        convert_layout=lambda x, layout, assert_trivial=False: x, program_id=lambda axis: machine().program,
        num_programs=lambda axis: machine().programs, allocate_shared_memory=allocate_shared_memory,
        warp_specialize=lambda partitions, warps, registers: machine().run(partitions),
        int16=torch.int16, int32=torch.int32, int64=torch.int64, float16=torch.float16, bfloat16=torch.bfloat16,
        float32=torch.float32,
    )  # fmt: skip
    hopper = module(
        "hopper", fence_async_shared=fence_async_shared, warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
        mbarrier=module(
            "mbarrier", wait=wait, arrive=arrive, init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, count: barrier.arrive(count),
            allocate_mbarrier=lambda batch: Barriers(Barrier() for _ in range(batch)),
        ),
        tma=module("tma", async_load=async_load, async_store=async_store, store_wait=store_wait),
    )  # fmt: skip
    gluon = module("gluon", jit=lambda function: function, language=language)
    prefix = "triton.experimental"
    return {
        "triton": module("triton"),
        prefix: module(prefix, gluon=gluon),
        f"{prefix}.gluon": gluon,
        f"{prefix}.gluon.language": language,
        f"{prefix}.gluon.language.nvidia": module("nvidia", hopper=hopper),
        f"{prefix}.gluon.language.nvidia.hopper": hopper,
    }


def emulated(*names: str, changes: dict[str, str] | None = None) -> types.ModuleType:
    """The last of the modules of kernels/, which may import those before it, with pieces of its source replaced."""
    fakes = _fakes()
    before = dict(sys.modules)
    try:
        sys.modules.update(fakes)
        for name in names:
            source = (KERNELS / f"{name}.py").read_text()
            if name == names[-1]:
                for old, new in (changes or {}).items():
                    assert source.count(old) >= 1, f"{name}.py no longer holds {old!r}"
                    source = source.replace(old, new, 1)
            module = types.ModuleType(f"fastgru.kernels.{name}")
            exec(compile(source, f"{name}.py", "exec", dont_inherit=True), vars(module))
            sys.modules[module.__name__] = module
    finally:
        sys.modules.clear()
        sys.modules.update(before)
    return module


def launch(kernel: Callable[..., None], programs: int, *arguments: Any, seed: int = 0, **constants: int) -> None:
    """Runs the programs of a launch, one after the other."""
    for program in range(programs):
        current.machine = Machine(program, programs, seed)
        kernel(*[Scalar(a) if type(a) is int else a for a in arguments], **constants)
