"""The 1x1 convolution of concat[x, h] in two halves, without the concatenation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat.autograd import saving_hooks
from .._compat.compiler import is_exporting
from .choose import eager_on_cpu
from .cpu.library import channels_last
from .fused import alike
from .norm import again, made_of
from .reference import Maybe


def mixed(x: Tensor, h: Tensor, weight: Tensor, bias: Maybe = None) -> Maybe:
    """`W * concat[x, h] + b` for a 1x1 convolution, in two halves, or None where the concatenation is the better way.

    It is neither made nor kept for the backward here. The halves are convolutions, or matrix products, one an image,
    at few channels. On the CPU, outside compiling and tracing.

    Args:
        x: (N, M, H, W).
        h: (N, R, H, W).
        weight: (K, M + R, 1, 1).
        bias: (K,), or None.

    Returns:
        (N, K, H, W) in x's memory format.
    """
    given = (x, h, weight) if bias is None else (x, h, weight, bias)
    if not eager_on_cpu(*given) or x.dim() != 4 or x.shape[2:] != h.shape[2:]:
        return None
    if torch.get_float32_matmul_precision() != "highest":  # which products follow on the CPU, and convolutions do not
        return None
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if weight.shape[1:] != (x.shape[1] + h.shape[1], 1, 1):
        return None
    # In gradient checkpointing nobody else would keep h, while its norm keeps what it was made of.
    source = made_of(h) if torch.is_grad_enabled() and saving_hooks() is not None else ()
    return _Mix.apply(x, h, weight, bias, *source)  # type: ignore[no-any-return, no-untyped-call]


def joined(x: Tensor, h: Tensor) -> Tensor:
    """`concat[x, h]` along the channels, laid out as the convolution behind it will read it.

    Inductor runs convolutions of the CPU in channels last, but lays a concatenation out as it was traced: it would
    write the maps transposed and then copy them back.
    """
    if not _inductor_lays_out(x):
        return torch.cat([x, h], 1)
    return torch.cat([x.permute(0, 2, 3, 1), h.permute(0, 2, 3, 1)], 3).permute(0, 3, 1, 2)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Y in x's memory format, where `joined` has changed it: the network's results keep theirs. No pass of its own."""
    if not _inductor_lays_out(x) or not x.is_contiguous():
        return y
    return y.contiguous()


def _inductor_lays_out(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and not is_exporting() and x.dim() == 4 and x.device.type == "cpu"


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, weight: Tensor, bias: Maybe, *source: Any) -> Tensor:
        ctx.save_for_backward(x, weight, *(source[:-1] or (h,)))
        ctx.eps = source[-1:]
        of_x, of_h = _halves(x, weight)
        if not _is_narrow(x, weight):
            return F.conv2d(x, of_x, bias).add_(F.conv2d(h, of_h))
        of_x, of_h = (part.flatten(1).expand(len(x), -1, -1) for part in (of_x, of_h))
        # Not matmul: it folds the batch into the columns, which leaves the result transposed.
        flat = torch.bmm(of_x, x.flatten(2)) if bias is None else torch.baddbmm(bias[:, None], of_x, x.flatten(2))
        return flat.baddbmm_(of_h, h.flatten(2)).view(len(x), len(weight), *x.shape[2:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        # In torch's operations on what was given, so that it can be differentiated again.
        x, weight, h, *norm = ctx.saved_tensors
        if norm and ctx.needs_input_grad[2]:
            h = again(h, *norm, *ctx.eps)
        x, dy = alike(x, dy)
        run = _by_products if _is_narrow(x, weight) else _by_convolution
        needed = [(needs, ctx.needs_input_grad[2]) for needs in ctx.needs_input_grad[:2]]
        halves = zip((x, h), _halves(x, weight), needed, strict=True)
        (dx, of_x), (dh, of_h) = (run(dy, t, part, needs) if any(needs) else (None, None) for t, part, needs in halves)
        dweight = None if of_x is None or of_h is None else torch.cat([of_x, of_h], 1)
        dbias = dy.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        return dx, dh, dweight, dbias, *(None for _ in ctx.needs_input_grad[4:])


def _is_narrow(x: Tensor, weight: Tensor) -> bool:
    """Check whether a matrix product per image is quicker than a convolution, whose layout the map then needs not."""
    return len(weight) < 32 and not channels_last(x)


def _halves(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns for x, (K, M, 1, 1), and those for h, (K, R, 1, 1)."""
    m = x.shape[1]
    return weight[:, :m], weight[:, m:]


def _by_convolution(dy: Tensor, t: Tensor, part: Tensor, needed: tuple[bool, bool]) -> tuple[Maybe, Maybe]:
    """Return the gradients of a map and of the columns for it."""
    dt, of_part, _ = torch.ops.aten.convolution_backward(
        dy, t, part, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (*needed, False)
    )
    return dt, of_part


def _by_products(dy: Tensor, t: Tensor, part: Tensor, needed: tuple[bool, bool]) -> tuple[Maybe, Maybe]:
    flat, rows = dy.flatten(2), part.flatten(1).t().expand(len(dy), -1, -1)
    dt = torch.bmm(rows, flat).view(t.shape) if needed[0] else None
    return dt, torch.bmm(flat, t.flatten(2).transpose(1, 2)).sum(0).view_as(part) if needed[1] else None
