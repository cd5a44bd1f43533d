"""The step of a light cell by the equations, from stacked weights: the gradients of gradients come from here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference as equations

GATES = {"rnn": 1, "gru": 3, "lstm": 4}

Maybe = Tensor | None


def differentiable(cell: str, inputs: tuple[Maybe, ...], outputs: tuple[Maybe, Maybe]) -> list[Maybe]:
    """Return the gradients of a step by the equations, so that they can be differentiated again.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        inputs: x, h, c, mix, weight and bias; None for a state of zeros.
        outputs: gradients of the new hidden and cell state; None where there is none.

    Returns:
        One gradient per input, None for None and for what needs none.
    """
    with torch.enable_grad():
        # Views, because the inputs may depend on one another: h was made from the weights, too.
        inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
        x, h, c, *weights = inputs
        assert x is not None
        state = None if h is None else (h,) if c is None else (h, c)
        results = reference(cell, x, state, *weights)
        pairs = [(result, grad) for result, grad in zip(results, outputs, strict=False) if grad is not None]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        grads = iter(
            torch.autograd.grad(
                [result for result, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(grads) if t is not None and t.requires_grad else None for t in inputs]


def reference(cell: str, x: Tensor, state: equations.State | None, *weights: Any) -> equations.State:
    """Return the step by the equations, from the stacked weights of all gates, the candidate last."""

    width = x.shape[1]

    def gates(first: int, last: int) -> equations.Gates:
        mix, weight, bias = (part[first * width : last * width] for part in weights)
        return partial(equations.light_gates, mix=mix, weight=weight, bias=bias, gates=last - first, width=width)

    if cell == "gru":
        return equations.gru(x, state, gates(0, 2), gates(2, 3))
    return getattr(equations, cell)(x, state, gates(0, GATES[cell]))  # type: ignore[no-any-return]
