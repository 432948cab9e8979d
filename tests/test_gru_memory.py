"""Memory of the C++ backend: what training holds until backward, and large pages under what is large."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastgru
from fastgru import _library, fast_path

pytestmark = pytest.mark.skipif(_library.load_error is not None, reason=str(_library.load_error))

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _held(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What the forward pass saves, and its output; every storage once, without parameters and input."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        found += module(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    storages = {t.untyped_storage().data_ptr(): t for t in found}
    return [t for address, t in storages.items() if address not in known]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [(1, 2000, 1), (1, 1, 7), (20, 100, 3), (20, 3, 200), (2, 500, 32)], ids=str)
@pytest.mark.parametrize("H", range(1, 9))
def test_few_units_hold_no_more_than_torch(H: int, sizes: tuple[int, int, int], bidirectional: bool) -> None:
    T, B, I = sizes
    x = torch.randn(T, B, I)
    ours, theirs = (
        sum(t.untyped_storage().nbytes() for t in _held(kind(I, H, bidirectional=bidirectional), x))
        for kind in (fastgru.GRU, nn.GRU)
    )
    assert ours <= theirs


def _advised(tensor: Tensor) -> bool:
    """Whether the middle of a tensor lies in memory for which large pages were asked."""
    middle = tensor.data_ptr() + tensor.untyped_storage().nbytes() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="this system has no large pages on request")
@pytest.mark.parametrize("way", ["direct", "operators"])
def test_large_pages_under_large_tensors(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "operators":
        monkeypatch.setattr(fast_path, "functions", None)
    elif _library.direct is None:
        pytest.skip(str(_library.direct_error))
    # More than malloc ever takes from its heap: fresh in every call.
    held = [t for t in _held(fastgru.GRU(8, 64), torch.randn(10, 4000, 8)) if t.untyped_storage().nbytes() > 33 << 20]
    assert len(held) == 1 and all(_advised(t) for t in held)
