"""Batch normalisation and ReLU in one, on the CPU, by norm.cpp: `ReLU(norm(x))` at half the memory traffic."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scale import ScaleShift
from .build import call, channels_last, chunks
from .choose import native_here
from .untouched import untouched


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """`F.relu(norm(x))`, by the native kernel where it is the same: a plain BatchNorm2d of float32 on the CPU.

    Args:
        norm: any norm; of a batch norm in training the running statistics move, as in its own forward.
        x: (N, C, H, W).

    Returns:
        A new tensor of x's shape.
    """
    if isinstance(norm, ScaleShift) and _native(norm, ScaleShift, x, norm.scale):
        return _scaled(_dense(x), norm.scale, norm.shift)
    if isinstance(norm, nn.BatchNorm2d) and norm.affine and _native(norm, nn.BatchNorm2d, x, norm.weight):
        if norm.training or norm.running_mean is None:
            if x.numel() > x.shape[1]:  # torch's norm says what is wrong with a single value
                return _in_training(norm, _dense(x))
        elif not torch.is_grad_enabled():
            return _evaluating(norm, _dense(x))
    return F.relu(norm(x))


def _native(norm: nn.Module, cls: type[nn.Module], x: Tensor, values: Tensor) -> bool:
    return untouched(norm, cls) and native_here(x, values) and x.dim() == 4 and x.shape[1] == len(values)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


def _evaluating(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    # By torch's own norm, of ones: the start of a fusion is exact in just its roundings.
    ones, zeros = torch.ones_like(norm.weight)[None], torch.zeros_like(norm.weight)
    scale = F.batch_norm(ones, zeros, norm.running_var, norm.weight, zeros, False, 0.0, norm.eps)[0]
    return _scaled(x, scale, norm.bias - norm.running_mean * scale)


def _in_training(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    y, mean, variance = _NormReLU.apply(x, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            # As torch has it: None is the cumulative average.
            factor = 1.0 / float(norm.num_batches_tracked or 0) if norm.momentum is None else norm.momentum
            count = x.numel() // x.shape[1]
            norm.running_mean.lerp_(mean, factor)
            norm.running_var.lerp_(variance * (count / (count - 1)), factor)
    return y  # type: ignore[no-any-return]


class _NormReLU(torch.autograd.Function):
    """x, weight, bias, eps to y, mean and (biased) variance; the latter two are constants to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _moments(x)
        scale = weight * torch.rsqrt(variance + eps)
        y = _scaled(x, scale, bias - mean * scale)
        ctx.save_for_backward(x, weight, bias, y, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            with torch.enable_grad():
                # Views, because x may depend on the weights: the same norm may have been applied before.
                inputs = x.view_as(x), weight.view_as(weight), bias.view_as(bias)
                again = F.relu(F.batch_norm(inputs[0], None, None, *inputs[1:], True, 0.0, ctx.eps))
                found = torch.autograd.grad(again, [t for t in inputs if t.requires_grad], dy, create_graph=True)
            grads = iter(found)
            return *(next(grads) if t.requires_grad else None for t in inputs), None
        return *_gradients(x, y, dy, weight, mean, torch.rsqrt(variance + ctx.eps)), None


def _sizes(x: Tensor) -> list[int]:
    return [x.shape[0], x.shape[1], x.shape[2] * x.shape[3], int(channels_last(x))]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, merged from those of the chunks."""
    parts, channels = chunks(x), x.shape[1]
    means, deviations = torch.empty(2, parts, channels, dtype=torch.float64).unbind()
    call("regulate_moments", _sizes(x), parts, torch.get_num_threads(), x, means, deviations)
    edges = [part * x.shape[0] // parts for part in range(parts + 1)]
    share = torch.tensor([(b - a) / x.shape[0] for a, b in pairwise(edges)], dtype=torch.float64)
    mean = share @ means
    variance = deviations.sum(0) / (x.numel() // channels) + share @ (means - mean) ** 2
    return mean.float(), variance.float()


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = torch.empty_like(x)
    call("regulate_scale_relu", _sizes(x), chunks(x), torch.get_num_threads(), x, scale, shift, y)
    return y


def _gradients(x: Tensor, y: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
    """dx, dweight, dbias of batch normalisation, with d = dy where the ReLU let pass."""
    form = torch.channels_last if channels_last(x) else torch.contiguous_format
    dy = dy.contiguous(memory_format=form)
    parts, threads, count = chunks(x), torch.get_num_threads(), x.numel() // x.shape[1]
    sums = torch.empty(2, parts, x.shape[1], dtype=torch.float64)
    call("regulate_norm_sums", _sizes(x), parts, threads, x, y, dy, mean, *sums.unbind())
    dbias, product = sums.sum(1).float()
    scale, dweight = weight * inverse, product * inverse
    dx = torch.empty_like(x)
    of_x, constant = -scale * inverse * dweight / count, -scale * dbias / count
    call("regulate_norm_input", _sizes(x), parts, threads, x, y, dy, mean, scale, of_x, constant, dx)
    return dx, dweight, dbias
