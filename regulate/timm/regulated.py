"""Entry points of the regulated architectures, as timm's registry wants them: functions of one module, by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from timm.models import DefaultCfg, get_arch_pretrained_cfgs, register_model
from torch import nn

from .architectures import PREFIX, architectures
from .create import create

Entry = Callable[..., nn.Module]

# Read by `register_model`, by this name.
default_cfgs: dict[str, Any] = {}


def register() -> None:
    """Register a regulated namesake of each architecture. Builds none of them."""
    for architecture in architectures():
        entry = _entry(architecture)
        cards = {card.tag or "": card for card in get_arch_pretrained_cfgs(architecture).values()}
        if cards:
            weights = any(card.has_weights for card in cards.values())
            default_cfgs[entry.__name__] = DefaultCfg(deque(cards), cards, weights)
        globals()[entry.__name__] = register_model(entry)


def _entry(architecture: str) -> Entry:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(architecture, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = PREFIX + architecture
    entry.__doc__ = f"Build timm's {architecture} with regulators; see `regulate.timm`."
    return entry
