"""Eq. (1) of the paper, ConvGRU and ConvLSTM as functions of their gates: the reference for every faster form.

`stacked` is a step from the weights of all gates in one, as the faster forms take them; gradients of gradients come
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

State = tuple[Tensor, ...]
Gates = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Maybe = Tensor | None
# mix, weight and bias of all gates, the candidate last.
Weights = tuple[Tensor, Tensor, Tensor]

# How many gates the steps have that have faster forms.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def light_gates(
    x: Tensor, h: Tensor, mix: Tensor, weight: Tensor, bias: Tensor, *, gates: int, width: int, dims: int = 2
) -> tuple[Tensor, ...]:
    """`W * [X, H] + b` in the paper's two steps: group i of a 1x1 mixes X_i with H_i, then a depthwise 3x3.

    Sizes are arguments, so that no shape is asked of what may be a tracer's proxy.

    Args:
        x: input, (N, C, H, W).
        h: hidden state, of x's shape.
        mix: (G*C, 2, 1, 1).
        weight: (G*C, 1, 3, 3).
        bias: (G*C,).
        gates: G.
        width: C.
        dims: number of spatial axes.

    Returns:
        G tensors of x's shape.
    """
    from_x, from_h = mix[:, 0], mix[:, 1]
    # Gate by gate: stacked maps of G*C channels cost more to allocate than to compute.
    return tuple(
        _CONVOLVE[dims](x * from_x[gate] + h * from_h[gate], weight[gate], bias[gate], padding=1, groups=width)
        for gate in _rows(gates, width)
    )


def dense_gates(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, *, gates: int, width: int, dims: int = 2
) -> tuple[Tensor, ...]:
    """`W * [X, H] + b` with a full 3x3. Shapes as in `light_gates`, but weight is (G*C, 2C, 3, 3)."""
    stacked = _CONVOLVE[dims](torch.cat([x, h], 1), weight, bias, padding=1)
    return tuple(stacked[:, gate] for gate in _rows(gates, width))


def _rows(gates: int, width: int) -> list[slice]:
    return [slice(gate * width, (gate + 1) * width) for gate in range(gates)]


def rnn(x: Tensor, state: State | None, gates: Gates) -> State:
    """`H = tanh(W * [X, H'] + b)`. State: `(H,)`, None for zeros."""
    (h,) = state or (torch.zeros_like(x),)
    (n,) = gates(x, h)
    return (torch.tanh(n),)


def gru(x: Tensor, state: State | None, gates: Gates, candidate: Gates) -> State:
    """`r, z = sigmoid(W * [X, H'])`, `n = tanh(W * [X, r.H'])`, `H = (1 - z).H' + z.n`. State: `(H,)`."""
    (h,) = state or (torch.zeros_like(x),)
    r, z = (torch.sigmoid(gate) for gate in gates(x, h))
    (n,) = candidate(x, r * h)
    return (torch.lerp(h, torch.tanh(n), z),)


def lstm(x: Tensor, state: State | None, gates: Gates) -> State:
    """`i, f, g, o = W * [X, H']`, `C = sigmoid(f).C' + sigmoid(i).tanh(g)`, `H = sigmoid(o).tanh(C)`.

    State: `(H, C)`, None for zeros.
    """
    h, c = state or (torch.zeros_like(x), torch.zeros_like(x))
    i, f, g, o = gates(x, h)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def stacked(cell: str, x: Tensor, state: State | None, *weights: Any) -> State:
    """Return the step by the equations, from the stacked weights of all gates, the candidate last."""
    width = x.shape[1]

    def gates(first: int, last: int) -> Gates:
        mix, weight, bias = (part[first * width : last * width] for part in weights)
        return partial(light_gates, mix=mix, weight=weight, bias=bias, gates=last - first, width=width)

    if cell == "gru":
        return gru(x, state, gates(0, 2), gates(2, 3))
    return (lstm if cell == "lstm" else rnn)(x, state, gates(0, GATES[cell]))


def differentiable(cell: str, inputs: tuple[Maybe, ...], outputs: tuple[Maybe, Maybe]) -> list[Maybe]:
    """Return the gradients of a step by the equations, so that they can be differentiated again.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        inputs: x, h, c, mix, weight and bias; None for a state of zeros.
        outputs: gradients of the new hidden and cell state; None where there is none.

    Returns:
        One gradient per input, None for None and for what needs none.
    """

    def step(x: Tensor, h: Maybe, c: Maybe, *weights: Tensor) -> State:
        return stacked(cell, x, None if h is None else (h,) if c is None else (h, c), *weights)

    return differentiated(step, inputs, outputs)


def differentiated(run: Callable[..., State], inputs: Sequence[Maybe], outputs: Sequence[Maybe]) -> list[Maybe]:
    """Return the gradients of a function's inputs, given those of its results, by torch's own operators.

    None where an input is None or needs no gradient. They can be differentiated again.
    """
    with torch.enable_grad():
        # Views, because the inputs may depend on one another: a state was made from the weights, too.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        pairs = [(result, grad) for result, grad in zip(run(*inputs), outputs, strict=False) if grad is not None]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        results, given = zip(*pairs, strict=True)
        grads = iter(torch.autograd.grad(results, wanted, given, create_graph=True, allow_unused=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in inputs]
