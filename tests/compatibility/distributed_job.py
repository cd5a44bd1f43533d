"""What test_uses_distributed.py runs in two processes: a few steps of training, as JSON on standard output.

torchrun --nproc-per-node 2 -m tests.compatibility.distributed_job MODE [DEVICE]

MODE is `alone`, `ddp`, `ddp_static`, `fsdp_stage` or `fsdp_block`. Norms stay in eval mode, because on the CPU
there is no norm over two processes, and each step's gradient is then exactly that of the joint batch.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from ..helpers import network, stirred

STEPS, BATCH = 3, 4


def sharded(model: nn.Module, by: str, device: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for unit in stage if by == "fsdp_block" else (stage,):
            fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrapped(model: nn.Module, mode: str, device: str) -> nn.Module:
    if mode.startswith("ddp"):
        ids = [dist.get_rank()] if device == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, static_graph=mode == "ddp_static")
    return sharded(model, mode, device) if mode.startswith("fsdp") else model


def losses(mode: str, device: str) -> list[float]:
    """The losses of a few steps, averaged over the processes."""
    rank, world = (0, 1) if mode == "alone" else (dist.get_rank(), dist.get_world_size())
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    model = stirred(network("torchvision/resnet18"), seed=0).double().to(where)
    model = wrapped(model, mode, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(1000, (BATCH,), generator=generator)
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        logits = 10 * nn.functional.normalize(model(images[mine].to(where)))
        loss = nn.functional.cross_entropy(logits, labels[mine].to(where))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        joint = loss.detach().clone()
        if world > 1:
            dist.all_reduce(joint)
        found.append(joint.item() / world)
    return found


def main(mode: str, device: str = "cpu") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if mode != "alone":
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    figures = losses(mode, device)
    if mode == "alone" or dist.get_rank() == 0:
        print(json.dumps(figures))
    if mode != "alone":
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        # A thread of gloo that outlives its group may abort an interpreter that ends; with the plain network, too.
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
