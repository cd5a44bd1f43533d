"""Bringing the read map and the state to the grid of the write point."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .._compat.autograd import is_tracing
from ..kernels.reference import State


def aligned(read: Any, x: Any, stride: tuple[int, ...], crop: bool) -> Any:
    """Bring the read map to the write grid: every s-th position, as the original ResNet's stride computes.

    With `crop` the middle of these: where a pool of the network rounds down, or its code pads the read map.
    """
    if any(step > 1 for step in stride):
        read = read[(Ellipsis, *(slice(None, None, step) for step in stride))]
    for axis in range(2, 2 + len(stride)) if crop else ():
        if not _is_concrete(read) or read.size(axis) > x.size(axis):
            start = (read.size(axis) - x.size(axis)) // 2
            read = read[(slice(None),) * axis + (slice(start, start + x.size(axis)),)]
    if _is_concrete(read) and read.shape[2:] != x.shape[2:]:
        # At a size whose grids part by more than the planned stride.
        read = F.interpolate(read, size=x.shape[2:])
    return read


def fitting(state: State | None, read: Any) -> State | None:
    """Return the entering state, or None where its maps have another shape: the memory begins anew there."""
    if state is None or not _is_concrete(read) or state[0].shape == read.shape:
        return state
    return None


def _is_concrete(x: Any) -> bool:
    """Check whether a shape may be asked for without a trace of the question in compiled or exported code."""
    return not (torch.compiler.is_compiling() or is_tracing() or isinstance(x, fx.Proxy))
