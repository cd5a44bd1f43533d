"""Whether the Triton kernels work here: tried once, on a small step, against the equations."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from .again import GATES, differentiable, reference


@functools.cache
def works(device: str) -> bool:
    """Runs every cell's step and gradients on a device and compares; a warning says why if they do not work."""
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
    """The largest error of a state or a gradient."""
    from . import triton_step

    rows = GATES[cell] * 3
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 4)] * 5 + [(rows, 2, 1, 1), (rows, 1, 3, 3), (rows,)]
    x, h, c, dh, dc, *rest = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    weights, memory = (rest[0], rest[1], rest[2]), cell == "lstm"
    old, grad = (c, dc) if memory else (None, None)
    with torch.no_grad():
        found = [*triton_step.forward(cell, x, h, old, weights, x.dtype)]
        found += triton_step.backward(cell, x, h, old, weights, dh, grad)
        state = (h, c) if memory else (h,)
        expected = [*reference(cell, x, state, *weights), None][:2]
    inputs = tuple(None if t is None else t.requires_grad_() for t in (x, h, old, *weights))
    expected += differentiable(cell, inputs, (dh, grad))
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True) if b is not None)
