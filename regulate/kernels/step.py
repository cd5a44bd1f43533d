"""One step of a light cell in the form that `choose` names."""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten, op
from .again import GATES
from .choose import choose


def step(
    cell: str, x: Tensor, state: tuple[Tensor, ...] | None, convs: tuple[tuple[Tensor, Tensor, Tensor], ...]
) -> tuple[Tensor, ...] | None:
    """One step by a fast form, or None where only the reference will do.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        x: input, (N, C, H, W).
        state: the old state, hidden state first, or None for zeros.
        convs: mix, weight and bias of each gate convolution; the GRU has two.

    Returns:
        The new state.
    """
    form = choose(cell, x, state, [part for conv in convs for part in conv], GATES[cell])
    if form is None:
        return None
    mix, weight, bias = convs[0] if len(convs) == 1 else (torch.cat(parts) for parts in zip(*convs, strict=True))
    h, c = (*(state or ()), None, None)[:2]
    if form == "aten":
        new_h, new_c = aten.step(cell, x, h, c, mix, weight, bias)
    else:
        new_h, new_c = op.light_step(cell, x, h, c, mix, weight, bias)
    return (new_h, new_c) if cell == "lstm" and new_c is not None else (new_h,)
