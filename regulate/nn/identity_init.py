"""The start: a fusion that computes what was there before, in eval mode exactly, in train mode nearly.

Exactly means bit by bit, on the CPU, in float32 and float64; half types round once more per fusion.

With the weight `[I | 0]` the hidden state contributes nothing yet, and with running mean m, running
variance v, weight sqrt(v + eps) and bias m a batch norm is the identity in eval mode. In train mode it
normalises by the batch's statistics instead, and stays nearly the identity if m and v are the true
ones. They need no data: the map is act(z) with z ~ Normal(beta, gamma^2), beta and gamma the affine
parameters of the norm before it.
"""

from __future__ import annotations

import copy
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat.modules import BatchNorm
from ..schema.values import Source
from .regulator import Fusion


def moments(model: nn.Module, sources: Sequence[Source], width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of a map, from the norms that made it.

    Args:
        model: the network; only read.
        sources: the map's channels in order; none stands for unit statistics.
        width: number of channels.

    Returns:
        Mean and variance, both (width,), float64 on the CPU.
    """
    parts = [_moments(model, source) for source in sources or (Source(width),)]
    if sum(len(mean) for mean, _ in parts) != width:  # an activation that halves the channels, more than once
        parts = [_moments(model, Source(width))]
    return torch.cat([mean for mean, _ in parts]), torch.cat([variance for _, variance in parts])


def _moments(model: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
    unit = torch.zeros(source.channels, dtype=torch.float64), torch.ones(source.channels, dtype=torch.float64)
    if not source.norm:
        return unit
    norm: Any = model.get_submodule(source.norm)
    part = slice(source.start, source.start + source.channels)
    beta, gamma = (
        default if affine is None else affine.detach()[part]
        for default, affine in zip(unit, (norm.bias, norm.weight), strict=True)
    )
    if beta.is_meta or gamma.is_meta:
        return unit
    try:
        mean, variance = _after(model, source.activation, beta.double().cpu(), gamma.double().cpu().abs())
    except Exception:  # the user's own module on numbers that are not its map: too few channels, no copy
        return unit
    half = 0.5**source.gate
    return mean * half, variance * half**2


def _after(model: nn.Module, activation: str, center: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    if activation == "none":
        return center, sigma**2
    if activation == "relu":
        return relu_moments(center, sigma)
    return quadrature_moments(_activation(model, activation), center, sigma)


def relu_moments(center: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ReLU(z), z ~ Normal(center, sigma^2), in closed form.

    Args:
        center: (C,), float64.
        sigma: (C,), float64, not negative.

    Examples:
        >>> mean, variance = relu_moments(torch.zeros(1).double(), torch.ones(1).double())
        >>> round(mean.item(), 4), round(variance.item(), 4)
        (0.3989, 0.3408)
    """
    a = center / sigma.clamp(min=1e-12)
    below = 0.5 * torch.erfc(-a / math.sqrt(2))
    density = torch.exp(-0.5 * a**2) / math.sqrt(2 * math.pi)
    mean = center * below + sigma * density
    square = (center**2 + sigma**2) * below + center * sigma * density
    return mean, (square - mean**2).clamp(min=0)


def quadrature_moments(activation: Callable[[Tensor], Tensor], center: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of activation(z), z ~ Normal(center, sigma^2), by the trapezoidal rule.

    Args:
        activation: elementwise, (points, C, 1, 1) to the same shape.
        center: (C,), float64.
        sigma: (C,), float64, not negative.
    """
    # Eight deviations to either side: the density there is 1e-14 of its peak.
    at = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    share = torch.exp(-0.5 * at**2)
    share = (share / share.sum())[:, None]
    with torch.no_grad():
        y = activation((center + at[:, None] * sigma)[:, :, None, None])[:, :, 0, 0]
    mean = (share * y).sum(0)
    return mean, (share * (y - mean) ** 2).sum(0)


def _activation(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation that a `Source` names, as a float64 function on the CPU."""
    kind, _, path = name.partition(":")
    if kind == "module":
        # Not by a call: hooks are for the maps of the network.
        return copy.deepcopy(model.get_submodule(path)).double().cpu().eval().forward
    function: Callable[[Tensor], Tensor] = pkgutil.resolve_name(path)
    return function


def settle(fusion: Fusion, mean: Tensor, variance: Tensor) -> None:
    """Make a fusion with batch norm the identity: `[I | 0]` and the norm's statistics and affine.

    Args:
        fusion: in the paper's form; its weight and norm are overwritten.
        mean: (M,), of the map at the write point.
        variance: (M,).
    """
    norm = fusion.mix_norm
    assert isinstance(norm, BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        nn.init.dirac_(fusion.mix.weight)
        most = torch.finfo(norm.running_mean.dtype).max / 4
        norm.running_mean.copy_(mean.clamp(-most, most))
        norm.bias.copy_(norm.running_mean)
        for target, values in zip((norm.running_var, norm.weight), _inverse_pair(variance, norm), strict=True):
            target.copy_(values)


def _inverse_pair(variance: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Variance and gain with gain / sqrt(variance + eps) = 1 as the backend rounds it: eval is exact then.

    A batch norm computes x * scale + (bias - mean * scale), so with mean = bias only the scale can be off.
    The variance gives way by a few units in the last place until there is a gain whose scale is 1.
    """
    assert norm.running_var is not None
    variance = _representable(variance.to(norm.running_var), norm.eps)
    step = torch.finfo(variance.dtype).eps
    for _ in range(32):
        gain = (variance + norm.eps).sqrt()
        for towards in (0.0, torch.inf):
            other = torch.nextafter(gain, torch.full_like(gain, towards))
            better = (_scale_of(variance, gain, norm.eps) != 1) & (_scale_of(variance, other, norm.eps) == 1)
            gain = torch.where(better, other, gain)
        missed = _scale_of(variance, gain, norm.eps) != 1
        if variance.is_meta or not missed.any():
            break
        variance = torch.where(missed, variance + step * (variance + norm.eps), variance)
    return variance, gain


def _representable(variance: Tensor, eps: float) -> Tensor:
    """Return the nearest variance that can be divided by, and that its type holds."""
    held = torch.finfo(variance.dtype)
    # A constant channel has none; eps, which is there for that, may be zero, also after rounding.
    return variance.clamp(0.0 if eps > held.tiny else held.tiny, held.max / 4)


def takes_moments(fusion: Fusion) -> bool:
    """Check whether a fusion starts from moments of the map: in the paper's form, with running statistics."""
    norm = fusion.mix_norm
    return not fusion.skip and isinstance(norm, BatchNorm) and norm.running_mean is not None


def is_settled(fusion: Fusion) -> bool:
    """Check whether the hidden state contributes nothing to the fusion yet: its weight is still `[I | 0]`."""
    weight = fusion.mix.weight
    return torch.equal(weight, nn.init.dirac_(torch.empty_like(weight)))


def is_idle(fusion: nn.Module) -> bool:
    """Check whether H contributes nothing to a fusion, in any of its forms: no weight of H, or a norm of gain zero."""
    mix, norm = getattr(fusion, "mix", None), getattr(fusion, "mix_norm", None)
    weight, gain = getattr(mix, "weight", None), getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return False
    silent = not weight[:, len(weight) :].any()
    return silent or (isinstance(gain, Tensor) and not gain.any())


def _scale_of(variance: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Return what a batch norm in eval mode multiplies each channel by, in the roundings of torch's own norm, all (C,).

    By that norm, of ones: how a backend rounds `gain / sqrt(variance + eps)` cannot be written down.
    """
    zeros = torch.zeros_like(gain)
    return F.batch_norm(torch.ones_like(gain)[None], zeros, variance, gain, zeros, False, 0.0, eps)[0]
