"""`regulate doctor`: what runs on this machine and why, in ten lines."""

from __future__ import annotations

import importlib.util
import os
import platform
from contextlib import suppress
from importlib import metadata

import torch

from .. import __version__, kernels
from ..kernels.cuda import gpu

DISTRIBUTION = "torch-regulate"
# What goes with which extra of the distribution.
COMPANIONS = {"timm": "timm", "torchvision": "zoo", "matplotlib": "inspect", "huggingface_hub": "hub"}


def report() -> str:
    """Return the lines. The first call may compile the CPU kernels."""
    installed = [name for name in COMPANIONS if _version(name)]
    missing = [name for name in COMPANIONS if name not in installed]
    lines = [
        f"regulate     {__version__} ({DISTRIBUTION}), in {os.path.dirname(os.path.dirname(__file__))}",
        f"Python       {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch        {torch.__version__}, {torch.get_num_threads()} threads, {_device()}",
        f"beside it    {', '.join(f'{name} {_version(name)}' for name in installed) or 'nothing'}",
        f"setting      {kernels.setting()} (REGULATE_KERNELS, regulate.kernels.use): the first of these that fits",
        f"  native     {_native()}",
        f"  triton     {_triton()}",
        "  aten       yes: every device and type, by torch's operations",
        "  reference  yes: everything else, by the equations",
        f"to install   {'; '.join(_advice(missing)) or 'nothing'}",
    ]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"


def _native() -> str:
    reason = kernels.why_no_native()
    if reason is not None:
        return f"no: {reason}"
    return f"yes: float32 on the CPU, {kernels.instruction_set()}, {kernels.origin()}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no: triton is not installed"
    if not torch.cuda.is_available():
        return "no: there is no CUDA device"
    return "yes: CUDA" if gpu.works("cuda") else "no: its trial failed, see the warning"


def _advice(missing: list[str]) -> list[str]:
    """Return what is worth installing here, each with its reason."""
    advice = []
    if kernels.why_no_native() is not None:
        advice.append("g++ or clang++, for the native kernels")
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        advice.append("triton, for CUDA")
    extras = ",".join(sorted({COMPANIONS[name] for name in missing}))
    if extras:
        advice.append(f"pip install '{DISTRIBUTION}[{extras}]', for {', '.join(missing)}")
    return advice
