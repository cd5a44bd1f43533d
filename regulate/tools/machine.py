"""What a figure is to be read with: processor, versions, kernels; and the memory that some work takes."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..kernels.cpu.build import told_of_processor


def resident_peak(work: Callable[[], object]) -> int:
    """How far the resident set of this process rises during some work, in bytes. Linux."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def machine(device: str) -> dict[str, Any]:
    """Return the processor, its threads, the versions, the kernels in use and their instruction set."""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": kernels.why_no_native() or "on",
        "instruction set": kernels.instruction_set(),
        "kernels": kernels.setting(),
    }


def processor() -> str:
    """Return the processor's name as its maker writes it."""
    return next(iter(told_of_processor("model name")), "") or platform.processor() or platform.machine()
