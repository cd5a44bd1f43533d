"""The step of a light cell on the CPU, by light.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import GATES, Maybe, Weights
from .library import call, chunks

_CELLS = {"rnn": 0, "gru": 1, "lstm": 2}

Maps = tuple[Tensor, Maybe, Maybe, Maybe, Maybe]


def forward(cell: str, x: Tensor, h: Maybe, c: Maybe, weights: Weights) -> tuple[Tensor, Tensor]:
    """One step. float32 on the CPU; x, h, c of one shape and one memory format.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        x: input, (N, C, H, W).
        h: hidden state, or None for zeros.
        c: cell state of an LSTM, or None for zeros.
        weights: mix (G*C, 2, 1, 1), weight (G*C, 1, 3, 3) and bias (G*C,) of all gates, the candidate last.

    Returns:
        The new hidden state and the new cell state, which is empty for the other two cells.
    """
    new_h = torch.empty_like(x)
    new_c = torch.empty_like(x) if cell == "lstm" else x.new_empty(0)
    _step(cell, weights, (x, h, c, None, None), (new_h, new_c, None), (None, None, None))
    return new_h, new_c


def backward(
    cell: str, x: Tensor, h: Maybe, c: Maybe, weights: Weights, new_h: Maybe, dh: Tensor, dc: Maybe
) -> tuple[Tensor, ...]:
    """Return the gradients of `forward`; dh and dc are those of its results. The gates are computed again.

    Args:
        cell: see `forward`, as x, h, c and weights.
        new_h: the new hidden state of an RNN, which is its gate; the other cells do without.
        dh: of the new hidden state.
        dc: of the new cell state, or None.

    Returns:
        Those of x, h, c (empty for a cell without), mix, weight and bias.
    """
    dx, dh_old = torch.empty_like(x), torch.empty_like(x)
    dc_old = torch.empty_like(x) if cell == "lstm" else x.new_empty(0)
    memory = new_h if cell == "rnn" else c
    # Each chunk of the batch has its own sums: no locks, and the same order of additions every time.
    sums = [weight.new_empty(chunks(x), *weight.shape) for weight in weights]
    _step(cell, weights, (x, h, memory, dh, dc), (dx, dc_old, dh_old), sums)
    return dx, dh_old, dc_old, *(part.sum(0) for part in sums)


def _step(cell: str, weights: Weights, maps: Maps, results: Sequence[Maybe], sums: Sequence[Maybe]) -> None:
    # The library reads as far as these sizes say. Autograd does not see what is exchanged through `.data`.
    x = maps[0]
    rows, given = GATES[cell] * x.shape[1], [t for t in maps if t is not None]
    if (rows and [w.numel() for w in weights] != [2 * rows, 9 * rows, rows]) or any(t.shape != x.shape for t in given):
        raise RuntimeError(
            f"a step of {cell} over {tuple(x.shape)} has maps of that shape and weights of {rows} rows; got others: "
            f"{[tuple(t.shape) for t in (*given, *weights)]}; leave them as they are until the backward pass has run"
        )
    call("regulate_step", x, _CELLS[cell], *weights, *maps, *results, *sums)
