"""Which objects can be regulated at all; checked before anything is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .errors import AlreadyRegulatedError, NotRegulatedError, UnsupportedModelError

# Set on the class of a rewritten holder: its `splice.Rewrite`.
MARK = "_regulate_rewrite"


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


def check_model(model: Any) -> None:
    """Raises the fitting error for anything that is not a plain model without regulators."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"regulate takes an nn.Module, got {name}; build the model first and pass the instance"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModelError(
            f"regulate takes the model itself, got it wrapped in {name}; regulate model.module and wrap the result"
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            f"regulate takes the model itself, got a compiled {name}; regulate the model before torch.compile"
        )
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
