"""Folding the norms of a regulated network away, for inference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ._compat import BatchNorm
from .errors import UnsupportedModelError
from .kernels.scale import scale_and_shift
from .nn.layers import ScaleReLU
from .nn.regulator import CONV, Fusion
from .rewrite.guard import check_regulated, regulators, unwrapped


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Return a copy of a regulated network that computes the same in fewer operations, for inference only.

    In every fusion the norm of the fused map, and the map itself where it is added, go into the 1x1
    convolution; the norm of H becomes one multiplication and one addition per element. What has no running
    statistics stays as it is (group norm), and so does the backbone: its norms are for the tools that fold
    convolutions and norms of any network.

    Args:
        model: a regulated network, in whatever mode; it is not changed. A wrapper around one will do, the
            copy is of what it holds.

    Returns:
        The copy, in eval mode and without gradients. Outputs agree to rounding. It can be exported and
        compiled, but neither be trained on nor saved by `regulate.save`: keep the original.

    Raises:
        NotRegulatedError: there are no regulators.
        UnsupportedModelError: it is such a copy already.

    Examples:
        >>> import torch
        >>> from regulate import optimize_for_inference, regulate
        >>> from torchvision.models import resnet18
        >>> regulated, images = regulate(resnet18()).eval(), torch.randn(1, 3, 64, 64)
        >>> torch.allclose(optimize_for_inference(regulated)(images), regulated(images), rtol=1e-4, atol=1e-4)
        True
    """
    check_regulated(model)
    if is_folded(model):
        raise UnsupportedModelError("this network is optimized for inference already; start from the original")
    folded = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
    for _, fusion in regulators(folded):
        assert isinstance(fusion, Fusion)
        _fold(fusion)
    return folded


def is_folded(model: nn.Module) -> bool:
    """Check whether a network came out of `optimize_for_inference`."""
    return any(fusion.folded for _, fusion in regulators(unwrapped(model)) if isinstance(fusion, Fusion))


def _fold(fusion: Fusion) -> None:
    """In place; the order matters: first the norm after the convolution, then what is added behind it."""
    fusion.folded = True
    scaled = _scaling(fusion.hidden_norm)
    if scaled is not None:
        fusion.hidden_norm = ScaleReLU(*scaled)
    weight = fusion.mix.weight.clone()
    bias = weight.new_zeros(len(weight))
    scaled = _scaling(fusion.mix_norm)
    if scaled is not None:
        scale, bias = scaled
        weight *= _column(scale, weight)
        fusion.mix_norm = nn.Identity()
    if not isinstance(fusion.mix_norm, nn.Identity):
        return
    if fusion.skip:
        weight[:, : len(weight)] += _column(torch.eye(len(weight)).to(weight), weight)
        fusion.skip = False
    fusion.mix = CONV[weight.dim() - 2](weight.shape[1], len(weight), 1).to(weight).requires_grad_(False)
    fusion.mix.weight.copy_(weight)
    assert fusion.mix.bias is not None
    fusion.mix.bias.copy_(bias)


def _scaling(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the scale and the shift of a batch norm with running statistics; None for any other norm."""
    if not isinstance(norm, BatchNorm) or norm.running_mean is None:
        return None
    return scale_and_shift(norm)


def _column(values: Tensor, weight: Tensor) -> Tensor:
    """(M,) or (M, M) with ones behind for the axes of a convolution's weight."""
    rows = values if values.dim() == 2 else values[:, None]
    return rows.view(*rows.shape, *(1,) * (weight.dim() - 2))
