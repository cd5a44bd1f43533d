"""Whether the Triton kernels work here: tried once, on a small step, against the equations."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from ..reference import GATES, differentiable, stacked


@functools.cache
def works(device: str) -> bool:
    """Run every cell's step and gradients on a device and compare; a warning says why if they do not work."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        off = max(_error(cell, device) for cell in GATES)
        reason = f"a trial step was off by {off:.1e}" if not off < 1e-3 else None
    except Exception as error:  # whatever a driver, a compiler or a version of Triton may raise
        reason = f"a trial step raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    if reason is not None:
        warnings.warn(f"regulate computes without its Triton kernels on {device}: {reason}", stacklevel=2)
    return reason is None


def _error(cell: str, device: str) -> float:
    """Return the largest error of a state or a gradient, each relative to the largest of its kind."""
    from . import triton_step

    rows = GATES[cell] * 3
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 4)] * 5 + [(rows, 2, 1, 1), (rows, 1, 3, 3), (rows,)]
    # Out of inference mode, whose tensors have no gradients; and the equations in double on the CPU, as a device
    # may round its own convolutions coarsely.
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        given = [t.to(device) for t in tensors]
        exact = [t.double().requires_grad_(k not in (3, 4)) for k, t in enumerate(tensors)]
        with torch.no_grad():
            x, h, c, dh, dc, weights = _arguments(cell, given)
            found = [*triton_step.forward(cell, x, h, c, weights, x.dtype)]
            found += triton_step.backward(cell, x, h, c, weights, dh, dc)
            x, h, c, dh, dc, weights = _arguments(cell, exact)
            expected = [*stacked(cell, x, (h,) if c is None else (h, c), *weights), None][:2]
        expected += differentiable(cell, (x, h, c, *weights), (dh, dc))
    pairs = zip(found, expected, strict=True)
    return max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs if b is not None)


def _arguments(cell: str, tensors: list[Tensor]) -> tuple[Any, ...]:
    x, h, c, dh, dc, mix, weight, bias = tensors
    memory = cell == "lstm"
    return x, h, c if memory else None, dh, dc if memory else None, (mix, weight, bias)
