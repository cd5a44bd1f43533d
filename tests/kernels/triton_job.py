"""Runs the Triton kernels in Triton's interpreter and compares them with the equations; one line of JSON a case.

A process of its own, because the interpreter is chosen when Triton is imported:
TRITON_INTERPRET=1 python -m tests.kernels.triton_job rnn gru lstm
"""

from __future__ import annotations

import itertools
import json
import sys

import torch

from regulate.kernels.cuda import gpu, triton_step
from regulate.kernels.reference import GATES, differentiable, stacked

FLOATS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def case(cell: str, shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, h, c, dh, dc in the type, then mix, weight and bias in float32, as autocast leaves them."""
    torch.manual_seed(sum(shape))
    form = torch.channels_last if last else torch.contiguous_format
    maps = [torch.randn(shape).to(memory_format=form, dtype=dtype) for _ in range(5)]
    rows = GATES[cell] * shape[1]
    return [*maps, torch.randn(rows, 2, 1, 1), torch.randn(rows, 1, 3, 3) / 3, torch.randn(rows)]


def both(cell: str, tensors: list[torch.Tensor], zeros: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The new state and the gradients by the kernels, and by the equations in double."""
    x, h, c, dh, dc, *weights = tensors
    state = [None, None] if zeros else [h, c if cell == "lstm" else None]
    found = [
        *triton_step.forward(cell, x, *state, tuple(weights), x.dtype),
        *triton_step.backward(cell, x, *state, tuple(weights), dh, dc if cell == "lstm" else None),
    ]
    # In double and on the CPU: a GPU rounds the reference's own convolutions to TF32.
    exact = [None if t is None else t.double().cpu() for t in (x, *state, *weights, dh, dc)]
    inputs = [None if t is None else t.requires_grad_() for t in exact[:6]]
    old = None if zeros else tuple(t for t in inputs[1:3] if t is not None)
    with torch.no_grad():
        new = [*stacked(cell, inputs[0], old, *inputs[3:]), None][:2]
    expected = [*new, *differentiable(cell, tuple(inputs), (exact[6], exact[7] if cell == "lstm" else None))]
    pairs = [(a, b.detach()) for a, b in zip(found, expected, strict=True) if b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def worst(cell: str, tensors: list[torch.Tensor], zeros: bool) -> float:
    """The largest error of a state or gradient, relative to its largest value; inf for a wrong shape or type."""
    errors = [0.0]
    for a, b in zip(*both(cell, tensors, zeros), strict=True):
        right = a.shape == b.shape and a.dtype in (tensors[0].dtype, torch.float32)
        errors.append(((a.double().cpu() - b).abs().max() / b.abs().max()).item() if right else float("inf"))
    return max(errors)


def strayed(cell: str) -> int:
    """How many numbers are not finite where the equations' are, with NaN in the corner of an input and a gradient."""
    count = 0
    for k in (0, 3):
        tensors = case(cell, (2, 2, 3, 4), False, torch.float32)
        tensors[k][0, 0, 0, 0] = float("nan")
        found, expected = both(cell, tensors, False)
        count += sum(int((b.isfinite() & ~a.isfinite()).sum()) for a, b in zip(found, expected, strict=True))
        assert not all(b.isfinite().all() for b in expected)
    return count


def main(cells: list[str]) -> None:
    """Every cell, layout, start and type on small odd maps."""
    with torch.inference_mode():
        assert gpu.works("cpu"), "the trial step that a process makes before it trusts the kernels, wherever it is"
    for cell, last, zeros in itertools.product(cells, (False, True), (False, True)):
        shape = (2, 3, 3, 5) if not last else (1, 17, 3, 2)
        error = worst(cell, case(cell, shape, last, torch.float32), zeros)
        print(json.dumps([cell, last, zeros, "torch.float32", error, FLOATS[torch.float32]]), flush=True)
    for cell, dtype in itertools.product(cells, (torch.bfloat16, torch.float16)):
        error = worst(cell, case(cell, (1, 2, 4, 3), False, dtype), False)
        print(json.dumps([cell, False, False, str(dtype), error, FLOATS[dtype]]), flush=True)
    for cell in cells:
        print(json.dumps([cell, "not finite", strayed(cell), 0]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
