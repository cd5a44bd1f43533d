"""Where a process runs: its device, and its rank among the processes of torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """The rank of this process among `world`, and its device."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def place(wish: str | None) -> Iterator[Place]:
    """Choose the device, and under torchrun join the process group."""
    kind = wish or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        yield Place(0, 1, torch.device(kind))
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    local = int(os.environ["LOCAL_RANK"])
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), torch.device(kind, local if kind == "cuda" else None))
    finally:
        dist.destroy_process_group()
