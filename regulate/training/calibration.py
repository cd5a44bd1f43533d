"""Replaces the estimated moments of a fresh start by measured ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..nn.identity_init import is_settled, settle, takes_moments
from ..nn.regulator import Fusion
from ..rewrite.disable import is_off
from ..rewrite.guard import as_written, check_regulated, regulators
from ..rewrite.lookup import chains
from ..utils.modes import in_mode
from ..utils.rollback import all_or_nothing


class _Moments:
    """Sums of a map and of its square per channel, in float64, as a forward pre-hook of a fusion."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Any = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].detach().transpose(0, 1).flatten(1).double()
        self.sums = self.sums + torch.stack([x.sum(1), x.square().sum(1)])
        self.count += x.shape[1]

    def result(self) -> tuple[Tensor, Tensor]:
        mean, square = self.sums / self.count
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
    fusions = {
        path.removesuffix(".regulator"): fusion
        for path, fusion in regulators(model)
        if isinstance(fusion, Fusion) and takes_moments(fusion)
    }
    if not fusions:
        raise CalibrationError(
            "calibrate sets the running statistics of fusions' batch norms, and this model has none; its fusions need "
            "no statistics"
        )
    if any(fusion.mix.weight.is_meta for fusion in fusions.values()):
        raise CalibrationError(
            "calibrate runs the model, and its tensors are on the meta device; give it memory and weights first "
            "(load_state_dict(assign=True), or to_empty)"
        )
    if any(is_off(chain) for chain in chains(model)):
        raise CalibrationError(
            "calibrate runs the regulators, and they are switched off here; call it outside of `with disabled(model)`"
        )
    if not all(is_settled(fusion) for fusion in fusions.values()):
        raise CalibrationError(
            "calibrate goes before training, while the fusion's weight is [I | 0], but it has been trained or was "
            'started at random; call it right after regulate(model, init="identity")'
        )
    found = _measured(model, fusions, batches)
    with all_or_nothing(nn.ModuleList(fusions.values())):
        for block, fusion in fusions.items():
            settle(fusion, *found[block].result())
    return model


def _measured(
    model: nn.Module, fusions: Mapping[str, Fusion], batches: Iterable[Tensor | Sequence[Any]]
) -> dict[str, _Moments]:
    """Return what was measured at each block; mean and variance are such as its norm can hold."""
    if isinstance(batches, Tensor):
        raise TypeError("calibrate takes an iterable of batches, got one tensor; pass a list, [images]")
    moments = {block: _Moments() for block in fusions}
    device = next(model.parameters()).device
    with in_mode(model, training=False), torch.no_grad(), as_written(), ExitStack() as hooks:
        for block, fusion in fusions.items():
            hooks.enter_context(fusion.register_forward_pre_hook(moments[block]))
        for index, batch in enumerate(batches):
            model(_images(batch).to(device))
            _check_finite(fusions, moments, f"batch {index}")
    missed = [block for block, one in moments.items() if not one.count]
    if len(missed) == len(moments):
        raise CalibrationError("calibrate measures on data, but got no batch; pass a loader or a list of inputs")
    if missed:
        raise CalibrationError(
            f"calibrate measures at every regulated block, and no batch reached {missed[0]}; pass batches that the "
            "whole network runs on"
        )
    return moments


def _images(batch: Tensor | Sequence[Any]) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            "a batch is a tensor of images, or a tuple or list that starts with one, as a loader yields them; got "
            f"a {type(batch).__name__}; pass (batch['image'] for batch in loader) where a batch is a dict"
        )
    return first


def _check_finite(fusions: Mapping[str, Fusion], moments: Mapping[str, _Moments], which: str) -> None:
    for block, one in moments.items():
        held: torch.dtype = fusions[block].mix_norm.running_var.dtype  # type: ignore[union-attr, assignment]
        if one.count and not all(values.to(held).isfinite().all() for values in one.result()):
            raise CalibrationError(
                f"calibrate needs finite statistics, and {which} brings NaN, infinity or an overflow into "
                f"{block}; nothing was changed; look at the input, or calibrate in float32 and convert afterwards"
            )
