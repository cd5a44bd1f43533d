"""Which objects can be regulated at all; checked before anything is looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._compat.compiler import as_written, compiled
from ..errors import AlreadyRegulatedError, UnsupportedModelError
from .lookup import check_regulated, is_regulated, regulators

__all__ = ["as_written", "check_model", "check_regulated", "is_regulated", "regulators", "unwrapped"]

# What FSDP and FSDP2 make of a module, by class name: to import torch.distributed.fsdp would take seconds.
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside nn.DataParallel, DistributedDataParallel and torch.compile, at any depth."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := compiled(model)) is not None:
            model = inner
        else:
            return model


def check_model(model: Any) -> None:
    """Raise the fitting error for anything that is not a model without regulators.

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
    if is_regulated(model):
        raise AlreadyRegulatedError(
            f"each network is regulated once, and this {name} has regulators already; call unregulate(model) first"
        )
