"""The step of a light cell as a torch operator, `regulate::light_step`, with its gradient.

As an operator it is opaque to torch.compile, which calls it as it is, and visible to whoever looks at torch's
operators as they run, a FLOP counter or a policy of checkpointing. Everybody else takes the shorter way of `fused`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat.operators import flop_formula
from . import fused
from .reference import GATES, Maybe

_ARGUMENTS = "str cell, Tensor x, Tensor? h, Tensor? c, Tensor mix, Tensor weight, Tensor bias"


light_step = torch.library.custom_op(
    "regulate::light_step",
    fused.forward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"({_ARGUMENTS}, ScalarType dtype) -> (Tensor, Tensor)",
)

light_step_backward = torch.library.custom_op(
    "regulate::light_step_backward",
    fused.backward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema=f"({_ARGUMENTS}, Tensor? new_h, Tensor dh, Tensor? dc) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@light_step.register_fake
def _(cell: str, x: Tensor, h: Maybe, c: Maybe, *rest: Any) -> tuple[Tensor, Tensor]:
    new = torch.empty_like(x, memory_format=fused.memory_format(x), dtype=rest[-1])
    return new, torch.empty_like(new) if cell == "lstm" else new.new_empty(0)


@light_step_backward.register_fake
def _(cell: str, x: Tensor, h: Maybe, c: Maybe, *rest: Any) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=fused.memory_format(x))
    dh_old = torch.empty_like(dx, dtype=x.dtype if h is None else h.dtype)
    dc_old = torch.empty_like(dx, dtype=x.dtype if c is None else c.dtype) if cell == "lstm" else x.new_empty(0)
    return dx, dh_old, dc_old, *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in rest[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    cell, *tensors, _ = inputs
    fused.save(ctx, cell, tensors, output[0])


def _backward(ctx: Any, dh: Maybe, dc: Maybe) -> tuple[Maybe, ...]:
    return None, *fused.gradients(ctx, light_step_backward, dh, dc), None


light_step.register_autograd(_backward, setup_context=_save)


@flop_formula(torch.ops.regulate.light_step)
def _flops(cell: str, x: Any, *rest: Any, **names: Any) -> int:
    """Two per multiply-add of the depthwise convolutions, which is what the counter sees of the readable form."""
    return 2 * 9 * GATES[cell] * x[0] * x[1] * x[2] * x[3]  # type: ignore[no-any-return]


@flop_formula(torch.ops.regulate.light_step_backward)
def _backward_flops(cell: str, x: Any, *rest: Any, **names: Any) -> int:
    return 2 * _flops(cell, x)
