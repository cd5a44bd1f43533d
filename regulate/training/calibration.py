"""Replaces the estimated moments of a fresh start by measured ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..nn.identity_init import is_settled, settle, takes_moments
from ..nn.regulator import Fusion
from ..rewrite.disable import is_off
from ..rewrite.guard import check_regulated, regulators
from ..rewrite.lookup import chains
from ..utils.modes import in_mode
from ..utils.rollback import all_or_nothing


class _Moments:
    """Sums of a map and of its square per channel, in float64, as a forward pre-hook of a fusion."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].detach().transpose(0, 1).flatten(1).double()
        sums = [x.sum(1), x.square().sum(1)]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.count += x.shape[1]

    def result(self) -> tuple[Tensor, Tensor]:
        mean, square = (total / self.count for total in self.sums)
        return mean, (square - mean**2).clamp(min=0)


def calibrate(model: nn.Module, batches: Iterable[Tensor | Sequence[Any]]) -> nn.Module:
    """Measure mean and variance at every write point and let the fusions start from them.

    `regulate` estimates these moments from the norm before the write point. Where there is none, or where
    its parameters tell little of the data, measured ones keep the network nearer to its old self in train
    mode. In eval mode its function does not change.

    Args:
        model: freshly regulated with `init="identity"` or `"unit"`. In place: only the fusions' norms.
            The backbone's own statistics and every training mode are left as they were.
        batches: inputs (N, C, H, W), or tuples that start with one, such as a loader yields. A few
            hundred images are plenty.

    Returns:
        The model.

    Raises:
        CalibrationError: a fusion is trained already, none has a batch norm to calibrate, there was no data, they
            are switched off or on the meta device, or a batch leads to NaN or to moments that the norm's dtype cannot
            hold. Nothing has changed then.
        TypeError: a batch is neither a tensor nor a tuple or list that starts with one.
        NotRegulatedError: there are no regulators.

    Examples:
        >>> import torch
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> model = calibrate(regulate(resnet18()), [torch.randn(2, 3, 64, 64)])
    """
    check_regulated(model)
    fusions = [fusion for _, fusion in regulators(model) if isinstance(fusion, Fusion) and takes_moments(fusion)]
    if not fusions:
        raise CalibrationError(
            "calibrate sets the statistics of fusions with a batch norm, and this model has none; its fusions add to "
            "the map and need no statistics"
        )
    if any(fusion.mix.weight.is_meta for fusion in fusions):
        raise CalibrationError(
            "calibrate runs the model, and its tensors are on the meta device; give it memory and weights first "
            "(load_state_dict(assign=True), or to_empty)"
        )
    if any(is_off(chain) for chain in chains(model)):
        raise CalibrationError(
            "calibrate runs the regulators, and they are switched off here; call it outside of `with disabled(model)`"
        )
    if not all(is_settled(fusion) for fusion in fusions):
        raise CalibrationError(
            "calibrate goes before training, while the fusion's weight is [I | 0], but it has been trained or was "
            'started at random; call it right after regulate(model, init="identity")'
        )
    found = _measured(model, fusions, batches)
    with all_or_nothing(nn.ModuleList(fusions)):
        for fusion, moments in zip(fusions, found, strict=True):
            settle(fusion, *moments)
    return model


def _measured(
    model: nn.Module, fusions: Sequence[Fusion], batches: Iterable[Tensor | Sequence[Any]]
) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance for each fusion, as its norm can hold them."""
    if isinstance(batches, Tensor):
        raise TypeError("calibrate takes an iterable of batches, got one tensor; pass a list, [images]")
    moments = [_Moments() for _ in fusions]
    handles = [f.register_forward_pre_hook(m) for f, m in zip(fusions, moments, strict=True)]
    device = next(model.parameters()).device
    try:
        with in_mode(model, training=False), torch.no_grad():
            for index, batch in enumerate(batches):
                model(_images(batch).to(device))
                _check_finite(model, fusions, moments, f"batch {index}")
    finally:
        for handle in handles:
            handle.remove()
    if not any(one.count for one in moments):
        raise CalibrationError("calibrate measures on data, but got no batch; pass a loader or a list of inputs")
    missed = [fusion for fusion, one in zip(fusions, moments, strict=True) if not one.count]
    if missed:
        raise CalibrationError(
            f"calibrate measures at every regulated block, and no batch reached {_block(model, missed[0])}; pass "
            "batches that the whole network runs on"
        )
    return [one.result() for one in moments]


def _block(model: nn.Module, fusion: nn.Module) -> str:
    return next(path for path, part in regulators(model) if part is fusion).removesuffix(".regulator")


def _images(batch: Tensor | Sequence[Any]) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            "a batch is a tensor of images, or a tuple or list that starts with one, as a loader yields them; got "
            f"a {type(batch).__name__}; pass (batch['image'] for batch in loader) where a batch is a dict"
        )
    return first


def _check_finite(model: nn.Module, fusions: Sequence[Fusion], moments: Sequence[_Moments], which: str) -> None:
    for fusion, one in zip(fusions, moments, strict=True):
        held: torch.dtype = fusion.mix_norm.running_var.dtype  # type: ignore[union-attr, assignment]
        if one.count and not all(values.to(held).isfinite().all() for values in one.result()):
            raise CalibrationError(
                f"calibrate needs finite statistics, and {which} brings NaN, infinity or an overflow into "
                f"{_block(model, fusion)}; nothing was changed; look at the input, or calibrate in float32 and "
                "convert afterwards"
            )
