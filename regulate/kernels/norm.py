"""Batch normalisation and ReLU in one, on the CPU, by norm.cpp: `ReLU(norm(x))` at half the memory traffic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from .addresses import has_address
from .choose import native_here
from .cpu.library import call
from .fused import alike
from .reference import differentiated

_MADE_OF = "_regulate_made_of"


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, unfused: Tensor | None = None) -> Tensor | None:
    """`ReLU(norm(x))` in one pass, or None where torch's operators are to do it.

    With `unfused` it is `ReLU(norm(x)) + min(unfused, 0)`, and of `unfused` no more is kept for the backward than
    is needed: nothing, if it has nothing below zero.

    In one pass: plain float32 on the CPU, with the statistics of the batch. With running statistics torch's operators
    are as fast.

    Args:
        norm: a batch norm; its running statistics move, as in its own forward.
        x: (N, C, H, W).
        unfused: the map before the fusion, of x's shape.

    Returns:
        A new tensor of x's shape.
    """
    mean, variance = norm.running_mean, norm.running_var
    moments = () if mean is None or variance is None else (mean, variance)
    # What is wrong with an epsilon is for torch to say, which takes integers and tensors for one, too.
    if not norm.affine or (moments and not norm.training) or not norm.eps > 0:
        return None
    if not _readable(x, norm.weight, norm.bias, *moments) or not _beside(x, unfused):
        return None
    if x.numel() <= x.shape[1]:  # torch's norm says what is wrong with a single value
        return None
    y, stats = _NormReLU.apply(*alike(x), norm.weight, norm.bias, float(norm.eps), unfused)  # type: ignore[no-untyped-call]
    move(norm, stats)
    return y  # type: ignore[no-any-return]


def made_of(y: Tensor) -> tuple[Any, ...]:
    """Return what `again` makes a map of; nothing if `norm_relu` made it not from one map, or it was changed since."""
    *references, eps = getattr(y.grad_fn, _MADE_OF, (None,))
    held = [reference() for reference in references]
    return (*held, eps) if held and not y._version and all(t is not None for t in held) else ()


def again(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return `ReLU(norm(x))`, in training, as `norm_relu` made it, to the bit; running statistics stay."""
    y, _ = _NormReLU.apply(*alike(x), weight.contiguous(), bias.contiguous(), eps, None)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]


def _readable(x: Tensor, *values: Tensor) -> bool:
    """Check whether these are what the library reads: it sees addresses, no types, no shapes and no strides."""
    return (
        native_here(x, *values) and x.dim() == 4 and all(v.shape == x.shape[1:2] and v.is_contiguous() for v in values)
    )  # fmt: skip


def _beside(x: Tensor, unfused: Tensor | None) -> bool:
    return unfused is None or (native_here(unfused) and unfused.shape == x.shape)


def move(norm: nn.BatchNorm2d, stats: Tensor) -> None:
    """Move the running statistics of a norm in training towards those of a batch, (3, C) as `_NormReLU` has them."""
    tracked = norm.training and norm.track_running_stats  # which users switch off for a while, the buffers stay
    if tracked and norm.running_mean is not None and norm.running_var is not None:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        # As torch has it: None is the cumulative average.
        factor = 1.0 / float(norm.num_batches_tracked or 0) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(stats[0], factor)
        norm.running_var.lerp_(stats[2], factor)


class _NormReLU(torch.autograd.Function):
    """x, weight, bias, eps, unfused to y and (3, C), constants to autograd: mean, 1 / deviation, unbiased variance."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, unfused: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, stats, below = torch.empty_like(x), x.new_empty(3, x.shape[1]), x.new_empty(1)
        call("regulate_norm_relu", x, x, weight, bias, eps, alike(x, unfused)[1], stats, below, y)
        ctx.save_for_backward(x, weight, bias, stats, unfused if below.item() else None)
        ctx.eps = eps
        if unfused is None:
            # Weakly: what is kept for the backward pass is for the hooks of saved tensors to decide.
            setattr(ctx, _MADE_OF, (*map(TensorWeakRef, (x, weight, bias)), eps))
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, unfused = ctx.saved_tensors
        of_unfused = dy.masked_fill(unfused >= 0, 0) if unfused is not None and ctx.needs_input_grad[4] else None
        if torch.is_grad_enabled() or not has_address(dy):
            return *_differentiable(x, weight, bias, ctx.eps, dy), None, of_unfused
        # Hooks of saved tensors, such as those that offload them, may bring them back in other strides.
        x, dy = alike(x, dy)
        weight, bias, stats = weight.contiguous(), bias.contiguous(), stats.contiguous()
        if dy.shape != x.shape or stats.shape != (3, *x.shape[1:2]) or {weight.shape, bias.shape} != {x.shape[1:2]}:
            raise RuntimeError("the maps or weights of a norm were exchanged for others before its backward pass ran")
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        call("regulate_norm_relu_backward", x, x, dy, weight, bias, stats, dx, dweight, dbias)
        return dx, dweight, dbias, None, of_unfused


def _differentiable(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dy: Tensor) -> list[Tensor | None]:
    """Return the gradients by torch's norm, so that they can be differentiated again."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)),)

    return differentiated(run, (x, weight, bias), (dy,))
