"""Entry points of the regulated architectures, as timm's registry wants them: functions of one module, by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from timm.models import DefaultCfg, get_pretrained_cfg, register_model
from torch import nn

from .create import create
from .families import PREFIX, tagged

Entry = Callable[..., nn.Module]

# Read by `register_model`, by this name.
default_cfgs: dict[str, Any] = {}


def register() -> None:
    """Register a regulated namesake of each architecture. Builds none of them."""
    for architecture, names in tagged().items():
        entry = _entry(architecture)
        default_cfgs[entry.__name__] = _cards(architecture, names)
        globals()[entry.__name__] = register_model(entry)


def _cards(architecture: str, names: list[str]) -> DefaultCfg:
    """Return the cards of an architecture by tag, the default first."""
    default = get_pretrained_cfg(architecture)
    cards = {card.tag or "": card for card in (default, *map(get_pretrained_cfg, names)) if card is not None}
    return DefaultCfg(deque(cards), cards, any(card.has_weights for card in cards.values()))


def _entry(architecture: str) -> Entry:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(architecture, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = PREFIX + architecture
    entry.__doc__ = f"Build timm's {architecture} with regulators; see `regulate.timm`."
    return entry
