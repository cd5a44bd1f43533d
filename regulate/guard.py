"""Which objects can be regulated at all; checked before anything is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .errors import AlreadyRegulatedError, NotRegulatedError, UnsupportedModelError

# Set on the class of a rewritten holder: its `splice.Rewrite`.
MARK = "_regulate_rewrite"

# What FSDP and FSDP2 make of a module, by class name: where these live differs from one torch to the next.
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in the model that was rewritten."""
    return ((path, module) for path, module in model.named_modules() if hasattr(type(module), MARK))


def is_regulated(model: nn.Module) -> bool:
    """Whether the model carries regulators.

    Args:
        model: any module.

    Example:
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> is_regulated(resnet18()), is_regulated(regulate(resnet18()))
        (False, True)
    """
    return any(True for _ in holders(model))


def regulators(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every block's regulator, in the model's order of holders and blocks."""
    for path, holder in holders(model):
        for block in getattr(type(holder), MARK).blocks:
            name = f"{block.name}.regulator"
            yield (f"{path}.{name}" if path else name), holder.get_submodule(name)


def check_regulated(model: nn.Module) -> None:
    """Raises NotRegulatedError for a model without regulators."""
    if not is_regulated(model):
        raise NotRegulatedError(
            f"this needs a regulated model, and {type(model).__name__} has no regulators; call regulate(model) first"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside nn.DataParallel, DistributedDataParallel and torch.compile, at any depth."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper has no public class
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_model(model: Any) -> None:
    """Raises the fitting error for anything that is not a model without regulators.

    nn.DataParallel and torch.compile keep nothing that depends on the model's parameters, so they can stay
    around a model while it is rewritten. DistributedDataParallel and FSDP do.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"regulate takes an nn.Module, got {type(model).__name__}; build the model first and pass the instance"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "DistributedDataParallel registers the parameters that it averages when it is built, so regulate comes "
            "before it, and this model is wrapped already; call DistributedDataParallel(regulate(ddp.module))"
        )
    if any(base.__name__ in _SHARDED for module in model.modules() for base in type(module).__mro__):
        raise UnsupportedModelError(
            "FSDP shards the parameters that it finds, so regulate comes before it, and this model is sharded already; "
            "build the model anew, regulate it, then call fully_shard on its stages"
        )
    model = unwrapped(model)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "regulate reads Python code, got a ScriptModule; regulate the model before torch.jit"
        )
    if isinstance(model, fx.GraphModule):
        raise UnsupportedModelError(
            "regulate takes a network whose blocks are modules, got a GraphModule, in which they are inlined; "
            "regulate the original network and trace the result"
        )
    if is_regulated(model):
        raise AlreadyRegulatedError(
            f"each network is regulated once, and this {name} has regulators already; call unregulate(model) first"
        )
