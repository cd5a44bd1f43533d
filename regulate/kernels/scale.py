"""What is left of a batch norm in inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import BatchNorm


def scale_of(variance: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return what a batch norm in eval mode multiplies each channel by, in the roundings of torch's own norm, all (C,).

    By that norm, of ones: how a backend rounds `gain / sqrt(variance + eps)` cannot be written down.
    """
    zeros = torch.zeros_like(gain)
    return F.batch_norm(torch.ones_like(gain)[None], zeros, variance, gain, zeros, False, 0.0, eps)[0]


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return what a batch norm with running statistics does in eval mode, `x * scale + shift`, both (C,)."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight if norm.affine else torch.ones_like(norm.running_var)
    scale = scale_of(norm.running_var, gain, norm.eps)
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias if norm.affine else shift
