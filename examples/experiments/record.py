"""What a run's JSON says about where its numbers come from."""

from __future__ import annotations

import hashlib
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import regulate
from regulate.tools.machine import processor

from .place import Place


def origin(at: Place) -> dict[str, Any]:
    """Return what computes the next epochs: commit, versions and machine. To be asked before they run."""
    return {"commit": commit(), "versions": versions(), "machine": machine(at)}


def digest(path: str | None) -> str | None:
    """Return the SHA-256 of a file, None for none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def digest_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 of names and values."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what decides numbers."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "regulate": regulate.__version__}
    return found | {name: metadata.version(name) for name in ("timm", "torchvision") if name in sys.modules}


def machine(at: Place) -> dict[str, Any]:
    """Return device, processor, instruction set, threads and processes."""
    cuda = at.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(at.device) if cuda else at.device.type,
        "processor": processor(),
        "instruction set": None if cuda else regulate.kernels.instruction_set(),
        "threads": torch.get_num_threads(),
        "processes": at.world,
    }


def commit() -> str | None:
    """Return the commit of the code, with `-dirty` if it was changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def peak_bytes(at: Place) -> int:
    """Return the most memory in use: of the device, or resident in the whole process."""
    if at.device.type == "cuda":
        return torch.cuda.max_memory_allocated(at.device)
    # Linux counts it in kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
