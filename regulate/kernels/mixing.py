"""The 1x1 convolution of concat[x, h] as matrix products, without the concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat.autograd import saving_hooks
from .._compat.compiler import is_exporting
from .choose import eager_on_cpu
from .cpu.library import channels_last
from .fused import alike
from .norm import again, made_of
from .reference import Maybe


def mixed(x: Tensor, h: Tensor, weight: Tensor, bias: Maybe = None) -> Maybe:
    """`W * concat[x, h] + b` for a 1x1 convolution, or None where the convolution is the better way.

    The concatenation is neither made nor kept for the backward, and at few channels a matrix product per image
    costs a third of the convolution. On the CPU, outside compiling and tracing.

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
        of_x, of_h = _halves(weight, x.shape[1])
        if channels_last(x):
            flat = torch.mm(_rows(x), of_x.t()) if bias is None else torch.addmm(bias, _rows(x), of_x.t())
            return flat.addmm_(_rows(h), of_h.t()).view(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)
        of_x, of_h = (part.expand(len(x), -1, -1) for part in (of_x, of_h))
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
        last = channels_last(x)
        halves = zip((x, h), _halves(weight, x.shape[1]), ctx.needs_input_grad, strict=False)
        maps = [(_spread_last if last else _spread)(dy, part, t) if needed else None for t, part, needed in halves]
        sums = [(_sums_last if last else _sums)(dy, t) for t in (x, h)] if ctx.needs_input_grad[2] else []
        dbias = dy.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        dweight = torch.cat(sums, 1).view_as(weight) if sums else None
        return *maps, dweight, dbias, *(None for _ in ctx.needs_input_grad[4:])


def _halves(weight: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the columns for x and those for h."""
    rows = weight.flatten(1)
    return rows[:, :m], rows[:, m:]


def _spread(dy: Tensor, part: Tensor, like: Tensor) -> Tensor:
    return torch.bmm(part.t().expand(len(dy), -1, -1), dy.flatten(2)).view(like.shape)


def _sums(dy: Tensor, t: Tensor) -> Tensor:
    return torch.bmm(dy.flatten(2), t.flatten(2).transpose(1, 2)).sum(0)


def _rows(t: Tensor) -> Tensor:
    """(N, C, H, W) in channels last as (N * H * W, C), without a copy where it is."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _spread_last(dy: Tensor, part: Tensor, like: Tensor) -> Tensor:
    return torch.mm(_rows(dy), part).view(len(dy), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)


def _sums_last(dy: Tensor, t: Tensor) -> Tensor:
    return torch.mm(_rows(dy).t(), _rows(t))
