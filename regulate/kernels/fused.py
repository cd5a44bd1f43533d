"""The step of a light cell in one kernel, native or Triton by the tensors' device, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .addresses import has_address
from .cpu import native
from .reference import Maybe, Weights, differentiable


def forward(
    cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the new hidden and cell state, see `native.forward`; any memory format, results of type `dtype`."""
    x, h, c = alike(x, h, c)
    if x.device.type == "cpu":
        return native.forward(cell, x, h, c, _dense(mix, weight, bias))
    from .cuda import triton_step  # Triton is there only beside a GPU

    return triton_step.forward(cell, x, h, c, _dense(mix, weight, bias), dtype)


def backward(
    cell: str,
    x: Tensor,
    h: Maybe,
    c: Maybe,
    mix: Tensor,
    weight: Tensor,
    bias: Tensor,
    new_h: Maybe,
    dh: Tensor,
    dc: Maybe,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, h, c, mix, weight and bias, see `native.backward`; maps of any memory format."""
    x, h, c, new_h, dh, dc = alike(x, h, c, new_h, dh, dc)
    weights = _dense(mix, weight, bias)
    if x.device.type == "cpu":
        return native.backward(cell, x, h, c, weights, new_h, dh, dc)
    from .cuda import triton_step

    return triton_step.backward(cell, x, h, c, weights, dh, dc)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format of a step's results: x's."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def alike(x: Tensor, *maps: Maybe) -> Any:
    """Return the maps in one memory format, x's where it has one; None for None."""
    form = memory_format(x)
    return [None if t is None else t.contiguous(memory_format=form) for t in (x, *maps)]


def _dense(mix: Tensor, weight: Tensor, bias: Tensor) -> Weights:
    return mix.contiguous(), weight.contiguous(), bias.contiguous()


def save(ctx: Any, cell: str, tensors: Sequence[Maybe], new_h: Tensor) -> None:
    """Keep for `gradients` what a step was given; of the results only an RNN's, which is its gate."""
    ctx.cell = cell
    ctx.save_for_backward(*tensors, new_h if cell == "rnn" else None)


def gradients(ctx: Any, run: Callable[..., Sequence[Maybe]], dh: Maybe, dc: Maybe) -> tuple[Maybe, ...]:
    """Return the gradients of the six tensors of a step, None for what was None; `run` is a form of `backward`."""
    x, h, c, mix, weight, bias, new_h = ctx.saved_tensors
    dh = torch.zeros_like(x) if dh is None else dh
    dc = dc if ctx.cell == "lstm" else None
    if torch.is_grad_enabled() or (run is backward and not has_address(dh, dc)):
        found: Sequence[Maybe] = differentiable(ctx.cell, (x, h, c, mix, weight, bias), (dh, dc))
    else:
        found = run(ctx.cell, x, h, c, mix, weight, bias, new_h, dh, dc)
    dx, dh_old, dc_old, *rest = found
    return dx, None if h is None else dh_old, None if c is None else dc_old, *rest


def step(cell: str, tensors: Sequence[Maybe], dtype: torch.dtype) -> tuple[Tensor, Maybe]:
    """`forward`, with its gradient: the new hidden state, and the new cell state of an LSTM."""
    return _Step.apply(cell, dtype, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: str, dtype: torch.dtype, *tensors: Any) -> tuple[Tensor, Maybe]:
        ctx.set_materialize_grads(False)
        x, h, c, mix, weight, bias = tensors
        new_h, new_c = forward(cell, x, h, c, mix, weight, bias, dtype)
        save(ctx, cell, tensors, new_h)
        return new_h, new_c if cell == "lstm" else None

    @staticmethod
    def backward(ctx: Any, dh: Maybe, dc: Maybe = None) -> tuple[Maybe, ...]:
        return None, None, *gradients(ctx, backward, dh, dc)
