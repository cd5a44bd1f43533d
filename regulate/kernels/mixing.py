"""The 1x1 convolution of concat[x, h] as two matrix products, without the concatenation."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import eager_on_cpu


def mixed(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
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
    if not eager_on_cpu(x, h, weight) or x.dim() != 4 or x.shape[2:] != h.shape[2:]:
        return None
    m, k = x.shape[1], weight.shape[0]
    rows = weight.reshape(k, -1)
    if x.is_contiguous():
        # Not matmul: it folds the batch into the columns, which leaves the result transposed.
        of_x, of_h = (part.expand(len(x), -1, -1) for part in (rows[:, :m], rows[:, m:]))
        pixels = x.flatten(2)
        flat = torch.bmm(of_x, pixels) if bias is None else torch.baddbmm(bias[:, None], of_x, pixels)
        flat = flat.baddbmm_(of_h, h.flatten(2))
        return flat.view(len(x), k, *x.shape[2:])
    if x.is_contiguous(memory_format=torch.channels_last):
        of_x, of_h = (part.permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in (x, h))
        w = rows[:, :m].t()
        flat = torch.mm(of_x, w) if bias is None else torch.addmm(bias, of_x, w)
        flat = flat.addmm_(of_h, rows[:, m:].t())
        return flat.view(len(x), *x.shape[2:], k).permute(0, 3, 1, 2)
    return None
