"""DDP and FSDP2: the example, run by torchrun with two Gloo processes, has the losses of one process."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastgru

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without Gloo")

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"
ARGUMENTS = ["--steps", "40", "--batch", "64", "--length", "6", "--hidden", "32", "--lr", "0.02"]


def run(out: Path, *arguments: str, torchrun: bool) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(EXAMPLE), *ARGUMENTS, *arguments, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    # Once in a while torch aborts a process that has finished, nn.GRU's as well: a thread of Gloo's drops a tensor as
    # the interpreter goes down, and is ended for wanting its lock. The losses are written by then.
    at_exit = torchrun and out.exists() and "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or at_exit, done.stdout + done.stderr
    losses: list[float] = json.loads(out.read_text(encoding="utf-8"))
    return losses


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of nn.GRU, unconverted."""
    return run(tmp_path_factory.mktemp("losses") / "one.json", "--torch", torchrun=False)


@pytest.mark.feature("Many processes", "DDP and FSDP2 over torchrun: the losses of one process")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_losses_of_two_processes(rnn: Any, strategy: str, one_process: list[float], tmp_path: Path) -> None:
    flags = [] if rnn.GRU is fastgru.GRU else ["--torch"]
    losses = run(tmp_path / "two.json", "--strategy", strategy, *flags, torchrun=True)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(one_process, rel=1e-4)


def test_a_sharded_module_is_converted() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    module = nn.GRU(3, 4, 2)
    plain = copy.deepcopy(module)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        fastgru.convert(module)
        assert isinstance(module, FSDPModule)
        assert isinstance(module, fastgru.GRU)
        assert not isinstance(module, nn.GRU)
        x = torch.randn(5, 2, 3)
        output, _ = module(x)
        torch.testing.assert_close(output, plain(x)[0])
        output.sum().backward()
        plain(x)[0].sum().backward()
        for got, want in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad.full_tensor(), want.grad)  # type: ignore[union-attr]
        fastgru.revert(module)
        assert isinstance(module, nn.GRU)
        torch.testing.assert_close(module(x)[0], output)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_module_in_the_first_fsdp_is_converted(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = nn.GRU(3, 4, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            nn.Sequential(copy.deepcopy(plain)), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        report = fastgru.conversion_report(fastgru.convert(model))
        assert [entry.swapped for entry in report.entries] == [True]
        x = torch.randn(5, 2, 3)
        output, _ = model(x)
        torch.testing.assert_close(output, plain(x)[0])
        output.sum().backward()
    finally:
        dist.destroy_process_group()


def test_the_example_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="are for processes that torchrun starts"):
        run(tmp_path / "none.json", "--strategy", "ddp", torchrun=False)
