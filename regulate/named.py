"""Models by name: timm's, torchvision's and the paper's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from .models import cifar_resnet


class ModelNameError(ValueError):
    """There is no model of the name that was asked for."""


def load_model(name: str, pretrained: bool = False) -> nn.Module:
    """Builds a model by its timm name, torchvision's as `torchvision/NAME`, the paper's as `cifar/DEPTH`.

    Raises:
        ModelNameError: there is none of that name; the message lists the closest.
        ModuleNotFoundError: the library is not installed.
    """
    if name.startswith("cifar/"):
        if pretrained or not name[6:].isdigit():
            raise ModelNameError(f"the paper's networks are cifar/20 and so on, without weights; got {name!r}")
        return cifar_resnet(int(name[6:]))
    return _from_torchvision(name[12:], pretrained) if name.startswith("torchvision/") else _from_timm(name, pretrained)


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ModelNameError(_unknown(name, timm.list_models(), "timm"))
    model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ModelNameError(_unknown(name, models.list_models(), "torchvision"))
    weights: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if name in models.list_models(models.detection) + models.list_models(models.segmentation):
        weights["weights_backbone"] = None
    if name in models.list_models(models.quantization):
        weights["quantize"] = False
    model: nn.Module = models.get_model(name, **weights)
    return model


def _unknown(name: str, there: Sequence[str], library: str) -> str:
    close = difflib.get_close_matches(name, there, 3)
    hint = f"did you mean {', '.join(close)}?" if close else f"see {library}'s list_models()"
    return f"{library} has no model {name!r}; {hint}"
