"""Emulates Gluon, Hopper's barriers, TMA and wgmma on the CPU, which Triton's interpreter does not.

The source of the kernels runs as Python, with this module in place of Gluon. The partitions of a warp-specialised
kernel, and if wanted those of all programs, run concurrently, in an order drawn at random at every barrier and copy.
Barriers count arrivals and bytes and have phases. TMA copies and wgmma complete late; TMA's stores and additions read
and write at different times. Shared memory starts as NaN and is NaN again during a copy into it.

These raise an error, whether or not numbers are wrong: a deadlock; an arrival too many; a product whose operands change
while it runs; a result read before it was waited for; an address out of bounds; a tile stored by TMA or multiplied
without a fence; memory written while a copy still reads it; a counter in memory that is read or raised without memory
order, or a TMA addition after it without a fence.

Not modelled: layouts, registers, the order of summation, the exponential's last bits.
"""

from __future__ import annotations

import functools
import inspect
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


#: A program and its partition.
Who = tuple[int, int]


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


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    pointer.check(mask)
    chosen = torch.as_tensor(mask).expand(pointer.offset.shape)
    value = torch.as_tensor(value).expand(pointer.offset.shape)
    pointer.base[pointer.offset[chosen].long()] = value[chosen].to(pointer.base.dtype).as_subclass(torch.Tensor)


class Shared:
    """Shared memory. ``dirt`` says whose stores no fence has made visible to TMA and wgmma."""

    def __init__(self, data: torch.Tensor, dirt: torch.Tensor) -> None:
        self.data, self.dirt = data, dirt
        self.dtype, self.shape = data.dtype, list(data.shape)

    def index(self, n: int) -> Shared:
        return Shared(self.data[n], self.dirt[n])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape), self.dirt.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order), self.dirt.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length), self.dirt.narrow(dim, start, length))

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        dirt = self.dirt.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize // self.dtype.itemsize])
        return Shared(self.data.view(dtype).view(*shape), dirt.view(*shape))

    def load(self, layout: Any) -> Tile:
        return tile(self.data.clone())

    def gather(self, indices: torch.Tensor, axis: int) -> Tile:
        return tile(torch.gather(self.data, axis, indices.long().as_subclass(torch.Tensor)))

    def place(self) -> int:
        return self.data.data_ptr()

    def store(self, value: torch.Tensor) -> None:
        if self.place() in [copy.place for copy in machine().copies if copy.reads]:
            raise KernelError("memory is written that a copy still reads")
        plain = value.as_subclass(torch.Tensor)
        # To write what is there already changes nothing for those that read.
        same = (self.data == plain) | (self.data.isnan() & plain.isnan())
        self.dirt[~same] = machine().number()
        self.data.copy_(plain)
        machine().dirty.setdefault(current.who, []).append(self.dirt)

    def check(self, what: str) -> None:
        if self.dirt.any():
            raise KernelError(f"{what} what no fence has made visible to it")


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
    """A TMA copy under way: out of memory, or, while ``reads``, into it."""

    def __init__(self, shared: Shared, action: Callable[[torch.Tensor], None], stores: bool) -> None:
        self.owner, self.stores, self.reads = current.who, stores, stores
        self.place, self.source, self.then = shared.place(), shared.data, action

    def read(self) -> None:
        if self.reads:
            self.source, self.reads = self.source.clone(), False

    def action(self) -> None:
        self.read()
        self.then(self.source)


class Product:
    """A wgmma under way."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Tile | None = None
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.check("a product reads")
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
    """Programs that run side by side: their partitions, as threads of which one runs at a time, and their copies."""

    def __init__(self, programs: int, seed: int) -> None:
        self.programs = Scalar(programs)
        self.random = random.Random(seed)
        self.habit, self.late = seed % 3, seed // 3 % 3
        self.dirty: dict[Who, list[torch.Tensor]] = {}
        self.copies: list[Copy] = []
        self.products: dict[Who, list[Product]] = {}
        self.waits: dict[Who, Callable[[], bool]] = {}
        self.turns: dict[Who, threading.Semaphore] = {}
        self.acquired: set[Who] = set()
        self.threads: list[threading.Thread] = []
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None

    def number(self) -> int:
        """Of the partition that runs, from 1 on."""
        return list(self.turns).index(current.who) + 1

    def start(self, who: Who, function: Callable[..., None], *arguments: Any, **constants: Any) -> None:
        self.waits[who] = lambda: True
        self.turns[who] = threading.Semaphore(0)
        self.products[who] = []
        run = lambda: self._partition(who, function, arguments, constants)  # noqa: E731
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def run(self) -> None:
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
        for thread in self.threads:
            thread.join()
        if self.error is not None:
            raise self.error
        if any(self.products.values()) or any(not copy.stores for copy in self.copies):
            raise KernelError("the kernel ends while something is under way")
        for copy in self.copies:
            copy.action()

    def _choose(self, ready: list[Who]) -> int:
        """Of partitions and copies: anything; or copies only when nothing else is left; or one partition only then."""
        if self.habit == 1 and ready:
            return self.random.randrange(len(ready))
        if self.habit == 2:
            others = [n for n in range(len(ready) + len(self.copies)) if n >= len(ready) or ready[n][1] != self.late]
            return self.random.choice(others or [0])
        return self.random.randrange(len(ready) + len(self.copies))

    def _partition(self, who: Who, function: Callable[..., None], arguments: Any, constants: Any) -> None:
        current.machine, current.who = self, who
        self.turns[who].acquire()
        try:
            if self.error is None:
                function(*arguments, **constants)
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


def warp_specialize(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, regs: Any) -> None:
    for n, (function, arguments) in enumerate(partitions[1:], 1):
        machine().start((current.who[0], n), function, *arguments)
    function, arguments = partitions[0]
    function(*arguments)


def wait(barrier: Barrier, phase: int) -> None:
    machine().pause(lambda: barrier.passed(int(phase)))


def arrive(barrier: Barrier) -> None:
    barrier.arrive()
    machine().pause()


def async_load(desc: Descriptor, place: Sequence[int], barrier: Barrier, result: Shared) -> None:
    def finish(target: torch.Tensor) -> None:
        whole, part = desc.inside(place)
        target.zero_()
        target[part] = desc.data[whole]
        barrier.complete(desc.nbytes_per_cta)

    assert result.shape == desc.block_shape
    if result.place() in [other.place for other in machine().copies if other.reads or not other.stores]:
        raise KernelError("memory is written that another copy uses")
    result.data.fill_(math.nan)
    machine().copies.append(Copy(result, finish, False))
    machine().pause()


def async_store(desc: Descriptor, place: Sequence[int], source: Shared, add: bool = False) -> None:
    def finish(tile: torch.Tensor) -> None:
        whole, part = desc.inside(place)
        desc.data[whole] = desc.data[whole] + tile[part] if add else tile[part]

    source.check("TMA stores")
    if add and current.who in machine().acquired:
        raise KernelError("TMA's addition is not ordered after the counter that was read")
    machine().copies.append(Copy(source, finish, True))
    machine().pause()


def store_wait(pendings: int, read_only: bool = True) -> None:
    assert pendings == 0
    for copy in [c for c in machine().copies if c.stores and c.owner == current.who]:
        copy.read()
        if not read_only:
            machine().copies.remove(copy)
            copy.action()


def fence_async_shared() -> None:
    for dirt in machine().dirty.pop(current.who, []):
        dirt[dirt == machine().number()] = 0


def inline_asm(code: str, *ignored: Any, is_pure: bool) -> None:
    assert code == "fence.proxy.async.global;" and not is_pure
    machine().acquired.discard(current.who)


def atomic_poll(pointer: Pointer, expected: int, sem: str, scope: str) -> None:
    if (sem, scope) != ("acquire", "gpu"):
        raise KernelError("a counter is read without order")
    pointer.check(True)
    machine().pause(lambda: int(pointer.base[pointer.offset]) == expected)
    machine().acquired.add(current.who)


def atomic_add(pointer: Pointer, value: int, sem: str, scope: str) -> None:
    if (sem, scope) != ("release", "gpu"):
        raise KernelError("a counter is raised without order")
    pointer.check(True)
    pointer.base[pointer.offset] += value
    machine().pause()


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
        chosen = a if condition else b
        return chosen if isinstance(chosen, torch.Tensor) else Scalar(chosen)
    return tile(torch.where(condition, a, b))


def full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Tile:
    return tile(torch.full(shape, value, dtype=dtype))


def cdiv(a: Any, b: int) -> Any:
    return Scalar(_quotient(a + b - 1, b)) if isinstance(a, int) and isinstance(b, int) else (a + b - 1) // b


def reduced(t: torch.Tensor) -> Any:
    """Of a reduction: a tile, or an integer of the kernel."""
    return Scalar(t) if t.dim() == 0 and not t.is_floating_point() else tile(t)


def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
    nothing = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return Shared(torch.full(shape, nothing, dtype=dtype), torch.zeros(shape, dtype=torch.uint8))


def allocate_mbarrier(batch: int | None = None) -> Any:
    return Barrier() if batch is None else Barriers(Barrier() for _ in range(batch))


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
        log2=torch.log2, cdiv=cdiv, broadcast=torch.broadcast_tensors, barrier=lambda: None,
        convert_layout=lambda x, layout, assert_trivial=False: x, program_id=lambda axis: Scalar(current.who[0]),
        num_programs=lambda axis: machine().programs, allocate_shared_memory=allocate_shared_memory,
        warp_specialize=warp_specialize, inline_asm=inline_asm, atomic_poll=atomic_poll, atomic_add=atomic_add,
        NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda shape, dtype: None),
        int16=torch.int16, int32=torch.int32, int64=torch.int64, float16=torch.float16, bfloat16=torch.bfloat16,
        float32=torch.float32,
    )  # fmt: skip
    hopper = module(
        "hopper", fence_async_shared=fence_async_shared, warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
        mbarrier=module(
            "mbarrier", wait=wait, arrive=arrive, init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, count: barrier.arrive(count),
            allocate_mbarrier=allocate_mbarrier,
        ),
        tma=module(
            "tma", async_load=async_load, async_store=async_store, store_wait=store_wait,
            async_atomic_add=functools.partial(async_store, add=True),
        ),
    )  # fmt: skip
    gluon = module("gluon", jit=lambda function: function, language=language)
    prefix = "triton.experimental"
    plain = module(
        "tl", condition=lambda condition, disable_licm: condition,
        range=lambda start, end, disable_licm: map(Scalar, range(start, end)),
    )  # fmt: skip
    return {
        "triton": module("triton", language=plain),
        "triton.language": plain,
        prefix: module(prefix, gluon=gluon),
        f"{prefix}.gluon": gluon,
        f"{prefix}.gluon.language": language,
        f"{prefix}.gluon.language.nvidia": module("nvidia", hopper=hopper),
        f"{prefix}.gluon.language.nvidia.hopper": hopper,
    }


def emulated(*names: str, changes: dict[str, str] | None = None, after: str = "") -> types.ModuleType:
    """The last of the modules ``names`` of kernels/, which may import those before it.

    ``changes`` replaces pieces of its source: of each the first one after ``after``.
    """
    fakes = _fakes()
    before = dict(sys.modules)
    try:
        sys.modules.update(fakes)
        for name in names:
            source = (KERNELS / f"{name.replace('.', '/')}.py").read_text()
            if name == names[-1]:
                for old, new in (changes or {}).items():
                    start = source.index(after)
                    assert old in source[start:], f"{name}.py no longer holds {old!r}"
                    source = source[:start] + source[start:].replace(old, new, 1)
            module = types.ModuleType(f"fastgru.kernels.{name}")
            exec(compile(source, f"{name}.py", "exec", dont_inherit=True), vars(module))
            sys.modules[module.__name__] = module
    finally:
        sys.modules.clear()
        sys.modules.update(before)
    return module


def launch(
    kernel: Callable[..., None], programs: int, *arguments: Any, seed: int = 0, together: bool = False, **constants: int
) -> None:
    """Runs the programs of a launch: one after the other, or all of them side by side."""
    given = [Scalar(a) if type(a) is int else a for a in arguments]
    for some in [range(programs)] if together else [[program] for program in range(programs)]:
        made = Machine(programs, seed)
        for program in some:
            made.start((program, 0), kernel, *given, **constants)
        made.run()


def launch_variant(
    variant: Any,
    kernel: Callable[..., None],
    arguments: tuple[dict[str, Any], dict[str, Any]],
    programs: int,
    **how: Any,
) -> None:
    """Runs a kernel as the backend launches its ``variant``: its tensors, and its numbers, by the parameters' names."""
    tensors, numbers = arguments
    given: list[Any] = []
    for name in inspect.signature(kernel).parameters:
        if name in variant.maps:
            given.append(Descriptor(tensors[name], variant.maps[name]))
        elif name in tensors:
            given.append(Pointer(torch.zeros(1) if tensors[name] is None else tensors[name]))
        elif name in numbers:
            given.append(numbers[name])
        else:
            assert name in variant.constants
    launch(kernel, programs, *given, **how, **variant.constants)
