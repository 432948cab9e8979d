"""Train a GRU language model with DDP or FSDP2, on one process or on many machines.

    python examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy ddp
    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy fsdp
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/train_distributed.py --strategy fsdp

It takes GPUs and NCCL where there are any, else CPUs and Gloo. The task: sequences that count, each from a number and
in steps of its own. The batch is that of all processes together, so the losses do not depend on their number.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastgru

VOCABULARY = 16


class LanguageModel(nn.Module):
    """Tokens [T, B] to logits [T, B, VOCABULARY]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.rnn = nn.GRU(hidden, hidden, num_layers=2)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.rnn(self.embedding(tokens))
        return self.head(output)


def distribute(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """The model, its gradients (ddp) or its parameters (fsdp) spread over the processes."""
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if strategy == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        fully_shard(model.rnn, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(arguments: argparse.Namespace, rank: int, processes: int, device: torch.device) -> list[float]:
    """The loss of each step, the mean over all processes."""
    torch.manual_seed(arguments.seed)  # the same weights everywhere
    model = LanguageModel(arguments.hidden)
    if not arguments.torch:
        fastgru.convert(model)
    model = distribute(model.to(device), arguments.strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    generator = torch.Generator().manual_seed(arguments.seed)
    losses = []
    for step in range(arguments.steps):
        start, stride = torch.randint(VOCABULARY, (2, arguments.batch), generator=generator)
        sequences = (start + stride * torch.arange(arguments.length)[:, None]) % VOCABULARY
        tokens = sequences.chunk(processes, dim=1)[rank].to(device)
        logits = model(tokens[:-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
        if rank == 0:
            print(f"step {step:4d}  loss {losses[-1]:.4f}", flush=True)
    return losses


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["none", "ddp", "fsdp"], default="none")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step, over all processes")
    parser.add_argument("--length", type=int, default=16, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch", action="store_true", help="leave nn.GRU as it is, to compare")
    parser.add_argument("--out", type=Path, help="write the losses there, as JSON")
    arguments = parser.parse_args(argv)

    # torchrun tells each process who it is.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if arguments.batch % processes:
        parser.error(f"--batch {arguments.batch} does not divide among {processes} processes")
    if (arguments.strategy == "none") != ("RANK" not in os.environ):
        parser.error("--strategy ddp and fsdp are for processes that torchrun starts, and those need one of them")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if arguments.strategy != "none":
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        losses = train(arguments, rank, processes, device)
    finally:
        if arguments.strategy != "none":
            dist.destroy_process_group()
    if rank == 0 and arguments.out is not None:
        arguments.out.write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
