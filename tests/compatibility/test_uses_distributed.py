"""Two processes: the same losses as one process on the joint batch. `distributed_job.py` is what they run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from .uses import TIMM, regulated, use

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]


def job(mode, device="cpu"):
    launch = [] if mode == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-W", "ignore", *launch, "-m", "tests.compatibility.distributed_job", mode, device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=300)


@functools.cache
def alone():
    return json.loads(job("alone").stdout)


def same_losses(mode, device="cpu"):
    done = job(mode, device)
    assert done.returncode == 0, done.stderr[:4000]  # the processes' own words come before torchrun's
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(set(found)) == len(found), "nothing was trained"
    assert found == pytest.approx(alone(), rel=1e-9 if device == "cpu" else 1e-6)


@use("distributed", "DistributedDataParallel, two processes (gloo)")
def test_ddp(name):
    same_losses("ddp")


@use("distributed", "DistributedDataParallel(static_graph=True), two processes (gloo)")
def test_ddp_static(name):
    same_losses("ddp_static")


@use("distributed", "FSDP2: fully_shard by stage, two processes (gloo)")
def test_fsdp(name):
    same_losses("fsdp_stage")


@use("distributed", "FSDP2: fully_shard by block, two processes (gloo)")
def test_fsdp_by_block(name):
    same_losses("fsdp_block")


@use("distributed", "SyncBatchNorm.convert_sync_batchnorm: every norm, the new ones too", TIMM)
def test_sync_batch_norm(name):
    model = regulated(name)
    norms = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    keys = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert all(isinstance(converted.get_submodule(path), nn.SyncBatchNorm) for path in norms)
    assert any("regulator" in path for path in norms)
    assert list(converted.state_dict()) == keys


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
@use("distributed", "DistributedDataParallel, two processes (NCCL)")
def test_nccl(name):
    same_losses("ddp", "cuda")
