"""The network of a run: plain, or regulated."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import regulate
from regulate.models.cifar import cifar_resnet

from .data import Data
from .messages import one_line
from .options import CIFAR_MODELS, Options


def build(options: Options, data: Data) -> nn.Module:
    """Return the network: plain, or regulated at the start that fits (`random` from scratch, else `identity`)."""
    torch.manual_seed(options.seed)
    model = _plain(options, data)
    _try(model, options, data)
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
        input_size=(data.channels, data.size, data.size),
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


@torch.no_grad()
def _try(model: nn.Module, options: Options, data: Data) -> None:
    """Run one image, so that a network for another size says so before anything is trained."""
    shape = (data.channels, data.size, data.size)
    try:
        model.eval()(torch.zeros(1, *shape))
    except Exception as error:
        raise ValueError(
            f"{options.model} does not take images of {'x'.join(map(str, shape))} ({one_line(error)}); "
            "give another --size"
        ) from error
    model.train()


def _start_from(model: nn.Module, options: Options) -> None:
    assert options.weights is not None
    try:
        state = load_file(options.weights)
    except OSError as error:
        raise ValueError(f"--weights takes the model.safetensors of a run; {options.weights}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{options.weights} is no whole safetensors file ({error}); make or get it again") from error
    if options.new_head:
        heads = tuple(f"{name}." for name in _heads(model))
        state |= {key: value for key, value in model.state_dict().items() if key.startswith(heads)}
    model.load_state_dict(state)


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifiers: what timm says, else the last linear layer."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))[-1:]
