"""The network of a run: plain, or regulated."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import regulate
from regulate.models.cifar import cifar_resnet

from .data import Data
from .options import CIFAR_MODELS, Options


def build(options: Options, data: Data) -> nn.Module:
    """Return the network: plain, or regulated at the start that fits (`random` from scratch, else `identity`)."""
    torch.manual_seed(options.seed)
    model = _plain(options, data)
    if options.weights:
        _start_from(model, options)
    if options.cell == "none":
        return model
    init = options.init or ("identity" if options.weights or options.pretrained else "random")
    model = regulate.regulate(
        model,
        options.cell,
        kernel=options.kernel,
        fusion=options.fusion,
        init=init,
        norm=options.norm,
        stages=options.stages,
        seed=options.seed,
        inplace=True,
    )
    return regulate.freeze_backbone(model) if options.frozen else model


def _plain(options: Options, data: Data) -> nn.Module:
    if options.model in CIFAR_MODELS:
        return cifar_resnet(
            int(options.model.rpartition("resnet")[2]),
            num_classes=data.classes,
            in_channels=data.channels,
            shortcut=options.shortcut,
            reduction=8 if options.model.startswith("se_") else 0,
            width=options.width,
        )
    import timm

    name = options.model.removeprefix("timm/")
    model: nn.Module = timm.create_model(
        name, pretrained=options.pretrained, num_classes=data.classes, in_chans=data.channels
    )
    return model


def _start_from(model: nn.Module, options: Options) -> None:
    assert options.weights is not None
    try:
        state = load_file(options.weights)
    except SafetensorError as error:
        raise ValueError(f"{options.weights} is no whole safetensors file ({error}); make or get it again") from error
    if options.new_head:
        head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        fresh = {key: value for key, value in model.state_dict().items() if key.startswith(f"{head}.")}
        state |= fresh
    model.load_state_dict(state)
