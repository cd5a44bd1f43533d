"""Models by name: timm's, torchvision's and the paper's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from .cifar import cifar_resnet


class ModelNameError(ValueError):
    """There is no model of the name that was asked for."""


def load_model(
    name: str, pretrained: bool = False, *, num_classes: int | None = None, in_chans: int | None = None
) -> nn.Module:
    """Build a model by its timm name, torchvision's as `torchvision/NAME`, the paper's as `cifar/DEPTH`.

    Args:
        name: the model's name.
        pretrained: with the library's pretrained weights.
        num_classes: width of the classifier; the library's default if None.
        in_chans: channels of the image; the library's default if None.

    Raises:
        ModelNameError: there is none of that name; the message lists the closest.
        ValueError: the library does not take the number of classes or channels.
        ModuleNotFoundError: the library is not installed.
    """
    if name.startswith("torchvision/"):
        if in_chans not in (None, 3):
            raise ValueError(
                f"torchvision's networks take 3 channels, got --in-chans {in_chans}; timm's take any number"
            )
        return _from_torchvision(name[12:], pretrained, {} if num_classes is None else {"num_classes": num_classes})
    if name.startswith("cifar/"):
        if pretrained or not name[6:].isdigit():
            raise ModelNameError(f"the paper's networks are cifar/20 and so on, without weights; got {name!r}")
        classes, channels = 10 if num_classes is None else num_classes, 3 if in_chans is None else in_chans
        return cifar_resnet(int(name[6:]), num_classes=classes, in_channels=channels)
    wanted = {"num_classes": num_classes, "in_chans": in_chans}
    return _from_timm(name, pretrained, {key: value for key, value in wanted.items() if value is not None})


def _from_timm(name: str, pretrained: bool, sizes: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        if name.startswith("regulated_"):
            plain = name.removeprefix("regulated_")
            raise ModelNameError(
                f"commands regulate what they are given; name {plain}, with --cell and so on, not {name}"
            )
        raise ModelNameError(_unknown(name, timm.list_models(), "timm"))
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **sizes)
    return model


def _from_torchvision(name: str, pretrained: bool, sizes: dict[str, int]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ModelNameError(_unknown(name, models.list_models(), "torchvision"))
    if pretrained and sizes:
        raise ValueError("torchvision's pretrained weights come with their own classes; leave out --num-classes")
    weights: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, **sizes}
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
