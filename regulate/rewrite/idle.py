"""A warning for regulators that do nothing and cannot learn to, which other tools bring about without a word."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from .._compat.autograd import function_transforms_are_active
from ..nn.identity_init import is_idle
from .carrier import Chain


def warn_if_idle(fusion: nn.Module, chain: Chain) -> None:
    """Warn, once a stage, where a training pass begins with a fusion that is frozen at its identity start.

    Called in every pass, so the first question is a cheap one: a parametrized weight is not asked for.

    Args:
        fusion: of the stage's first block.
        chain: the stage; remembers that it was looked at.
    """
    if torch.compiler.is_compiling():
        return
    weight = getattr(getattr(fusion, "mix", None), "_parameters", {}).get("weight")
    if weight is None or weight.requires_grad or chain.looked_at:
        return
    # A batch of weights, as vmap makes it, cannot be asked.
    if not (fusion.training and torch.is_grad_enabled()) or function_transforms_are_active():
        return
    chain.looked_at = True
    if is_idle(fusion):
        warnings.warn(
            "regulators are frozen at their start, where they are the identity, so they do nothing and learn nothing "
            "in this training; let regulator_parameters(model) require gradients (peft: "
            'modules_to_save=["regulator"]), or call unregulate(model)',
            stacklevel=2,
        )
