"""Eq. (1) of the paper, ConvGRU and ConvLSTM as functions of their gates: the reference for every faster form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

State = tuple[Tensor, ...]
Gates = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


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
