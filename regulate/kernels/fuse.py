"""The fusion of one block in training as one node of autograd, on the CPU, by fuse.cpp; for narrow maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .library import call
from .norm import move, readable

# Channels of x and h together: the products of wider maps are for the library that torch calls. And floats of one
# image's x and h: where it does not stay near the core, the layers one by one are as fast.
WIDEST, NEAR = 128, 32768

Fused = tuple[Tensor, Tensor]


def fuse(
    x: Tensor, hidden: Tensor, hidden_norm: nn.BatchNorm2d, mix: nn.Conv2d, mix_norm: nn.BatchNorm2d
) -> Fused | None:
    """`h = ReLU(hidden_norm(H)); y = ReLU(mix_norm(mix(concat[x, h])))` in training, or None where parts do as well.

    Args:
        x: (N, M, H, W).
        hidden: H, (N, R, H, W).
        hidden_norm: of R channels; its running statistics move, as in its own forward.
        mix: 1x1, M + R -> M, without bias.
        mix_norm: of M channels, as `hidden_norm`.

    Returns:
        y and h.
    """
    if not (hidden_norm.training and mix_norm.training and x.is_contiguous() and hidden.is_contiguous()):
        return None
    pixels = x.shape[2:].numel()
    if x.dim() != 4 or x.shape[0] * pixels < 2 or mix.in_channels > WIDEST or mix.in_channels * pixels > NEAR:
        return None
    if hidden.shape != (x.shape[0], mix.in_channels - x.shape[1], *x.shape[2:]) or mix.bias is not None:
        return None
    if not (_suits(hidden_norm, hidden) and _suits(mix_norm, x) and _suits_mix(mix, x)):
        return None
    weights = hidden_norm.weight, hidden_norm.bias, mix.weight, mix_norm.weight, mix_norm.bias
    y, h, *stats = _Fuse.apply(x, hidden, *weights, hidden_norm.eps, mix_norm.eps)  # type: ignore[no-untyped-call]
    move(hidden_norm, stats[0])
    move(mix_norm, stats[1])
    return y, h


def _suits(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    statistics = () if mean is None or variance is None else (mean, variance)
    return norm.affine and readable(x, norm.weight, norm.bias, *statistics)


def _suits_mix(mix: nn.Conv2d, x: Tensor) -> bool:
    weight = mix.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype and weight.device == x.device
    return plain and weight.shape == (x.shape[1], mix.in_channels, 1, 1) and weight.is_contiguous()


class _Fuse(torch.autograd.Function):
    """To y, h and, constants to autograd, the statistics of both norms, (3, C) each as `_NormReLU` has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, eps_h, eps_y = rest
        weight_h, bias_h, mix, weight_y, bias_y = weights
        h, mixed, y = torch.empty_like(hidden), torch.empty_like(x), torch.empty_like(x)
        stats = x.new_empty(3, hidden.shape[1]), x.new_empty(3, x.shape[1])
        norms = weight_h, bias_h, eps_h, mix, weight_y, bias_y, eps_y
        call("regulate_fuse", _sizes(x, hidden), torch.get_num_threads(), x, hidden, *norms, h, mixed, y, *stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, hidden, *weights, h, mixed, *stats)
        ctx.eps = eps_h, eps_y
        ctx.mark_non_differentiable(*stats)
        return y, h, *stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, hidden, *weights, h, mixed, stats_h, stats_y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable((x, hidden, *weights), ctx.eps, (dy, dh)), None, None
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        weight_h, bias_h, mix, weight_y, bias_y = weights
        given = x, hidden, h, mixed, weight_h, bias_h, stats_h, mix, weight_y, bias_y, stats_y
        grads = [torch.empty_like(t) for t in (x, hidden, *weights)]
        threads = torch.get_num_threads()
        incoming = dy, None if dh is None else dh.contiguous()
        call("regulate_fuse_backward", _sizes(x, hidden), threads, *given, *incoming, *grads)
        return *grads, None, None


def _sizes(x: Tensor, hidden: Tensor) -> list[int]:
    return [len(x), hidden.shape[1], x.shape[1], x.shape[2] * x.shape[3]]


def _differentiable(
    inputs: tuple[Tensor, ...], eps: tuple[float, float], outputs: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients by torch's operators, so that they can be differentiated again."""
    with torch.enable_grad():
        # Views, because one may depend on another: H was made from what the same norm put out before.
        inputs = tuple(t.view_as(t) for t in inputs)
        x, hidden, weight_h, bias_h, mix, weight_y, bias_y = inputs
        h = F.relu(F.batch_norm(hidden, None, None, weight_h, bias_h, True, 0.0, eps[0]))
        y = F.conv2d(torch.cat([x, h], 1), mix)
        y = F.relu(F.batch_norm(y, None, None, weight_y, bias_y, True, 0.0, eps[1]))
        pairs = [(out, grad) for out, grad in zip((y, h), outputs, strict=True) if grad is not None]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if t.requires_grad else None for t in inputs]
