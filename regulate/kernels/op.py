"""The step of a light cell as a torch operator, `regulate::light_step`, with its gradient.

As an operator it is opaque to autograd and to torch.compile, which calls it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native
from .again import GATES, differentiable

_ARGUMENTS = "str cell, Tensor x, Tensor? h, Tensor? c, Tensor mix, Tensor weight, Tensor bias"

Maybe = Tensor | None


@torch.library.custom_op(
    "regulate::light_step", mutates_args=(), device_types="cpu", schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def light_step(
    cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The new hidden and cell state, see `native.forward`; maps of any memory format."""
    form = _format(x)
    x, h, c = (_in(form, t) for t in (x, h, c))
    return native.forward(cell, x, h, c, _dense(mix, weight, bias))


@light_step.register_kernel("cuda")
def _(cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from . import triton_step  # Triton is there only beside a GPU

    form = _format(x)
    dtype = _type(x)
    x, h, c = (_in(form, t) for t in (x, h, c))
    return triton_step.forward(cell, x, h, c, _dense(mix, weight, bias), dtype)


@torch.library.custom_op(
    "regulate::light_step_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_ARGUMENTS}, Tensor dh, Tensor? dc) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def light_step_backward(
    cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor, dh: Tensor, dc: Maybe
) -> tuple[Tensor, ...]:
    """The gradients of x, h, c, mix, weight and bias, see `native.backward`; maps of any memory format."""
    form = _format(x)
    x, h, c, dh, dc = (_in(form, t) for t in (x, h, c, dh, dc))
    return native.backward(cell, x, h, c, _dense(mix, weight, bias), dh, dc)


@light_step_backward.register_kernel("cuda")
def _(
    cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor, dh: Tensor, dc: Maybe
) -> tuple[Tensor, ...]:
    from . import triton_step

    form = _format(x)
    x, h, c, dh, dc = (_in(form, t) for t in (x, h, c, dh, dc))
    return triton_step.backward(cell, x, h, c, _dense(mix, weight, bias), dh, dc)


def _format(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _type(x: Tensor) -> torch.dtype:
    """Of the new state: x's, or that of the autocast region, whose convolutions would have computed the gates."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _in(form: torch.memory_format, t: Maybe) -> Any:
    return None if t is None else t.contiguous(memory_format=form)


def _dense(mix: Tensor, weight: Tensor, bias: Tensor) -> native.Weights:
    return mix.contiguous(), weight.contiguous(), bias.contiguous()


@light_step.register_fake
def _(cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.empty_like(x, memory_format=_format(x), dtype=_type(x))
    return new, torch.empty_like(new) if cell == "lstm" else new.new_empty(0)


@light_step_backward.register_fake
def _(
    cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor, dh: Tensor, dc: Maybe
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=_format(x))
    dh_old = torch.empty_like(dx, dtype=x.dtype if h is None else h.dtype)
    dc_old = torch.empty_like(dx, dtype=x.dtype if c is None else c.dtype) if cell == "lstm" else x.new_empty(0)
    return dx, dh_old, dc_old, *(torch.empty_like(w) for w in _dense(mix, weight, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.cell, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dh: Maybe, dc: Maybe) -> tuple[Maybe, ...]:
    x, h, c, *weights = ctx.saved_tensors
    dh = torch.zeros_like(x) if dh is None else dh
    dc = dc if ctx.cell == "lstm" else None
    if torch.is_grad_enabled():
        found = differentiable(ctx.cell, (x, h, c, *weights), (dh, dc))
    else:
        found = light_step_backward(ctx.cell, x, h, c, *weights, dh, dc)
    dx, dh_old, dc_old, *rest = found
    return None, dx, None if h is None else dh_old, None if c is None else dc_old, *rest


light_step.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.regulate.light_step)
def _flops(cell: str, x: Any, *rest: Any, **names: Any) -> int:
    """Two per multiply-add of the depthwise convolutions, which is what the counter sees of the readable form."""
    return 2 * 9 * GATES[cell] * x[0] * x[1] * x[2] * x[3]  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.regulate.light_step_backward)
def _backward_flops(cell: str, x: Any, *rest: Any, **names: Any) -> int:
    return 2 * _flops(cell, x)
