"""One step of a light cell in the form that `choose` names."""

from __future__ import annotations

import torch
from torch import Tensor

from .._compat.autograd import operators_are_watched
from . import aten, fused, op
from .choose import choose
from .reference import GATES


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
    if cell not in GATES:
        return None
    form = choose(cell, x, state, [part for conv in convs for part in conv], GATES[cell])
    if form is None:
        return None
    mix, weight, bias = convs[0] if len(convs) == 1 else (torch.cat(parts) for parts in zip(*convs, strict=True))
    h, c = (*(state or ()), None, None)[:2]
    tensors = (x, h, c, mix, weight, bias)
    if form == "aten":
        new_h, new_c = aten.step(cell, *tensors)
    elif torch.compiler.is_compiling() or operators_are_watched():
        new_h, new_c = op.light_step(cell, *_laid_out(x, h, c), mix, weight, bias, _type(x))
    else:
        new_h, new_c = fused.step(cell, tensors, _type(x))
    return (new_h, new_c) if cell == "lstm" and new_c is not None else (new_h,)


def _laid_out(*maps: Tensor | None) -> list[Tensor | None]:
    """Return the maps as inductor has them on the CPU, where it lays out every convolution in channels last.

    It keeps the layout that an operator saw when it was traced: without this it would copy maps there and back.
    """
    if not torch.compiler.is_compiling() or maps[0] is None or maps[0].device.type != "cpu":
        return list(maps)
    return [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in maps]


def _type(x: Tensor) -> torch.dtype:
    """Of the new state: x's, or that of the autocast region, whose convolutions would have computed the gates."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
