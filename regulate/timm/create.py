"""Building a regulated architecture: timm's network, its weights, then the regulators."""

from __future__ import annotations

import dataclasses
from typing import Any

from timm.models import PretrainedCfg, model_entrypoint, resolve_pretrained_cfg
from torch import Tensor, nn

from .. import RegulatorConfig
from ..analysis.planner import make_plan
from ..config import OPTIONS
from ..rewrite.install import prepare
from .families import PREFIX
from .network import enlist
from .weights import fill, split, weights_of

# Of a pretrained_cfg: where weights come from.
_SOURCE = ("source", "state_dict")


def create(
    architecture: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network as timm does and regulate it. What `timm.create_model` calls for a regulated architecture.

    Args:
        architecture: timm's name, without tag.
        pretrained: with the weights that the card names: of the original network, or of a regulated one.
        pretrained_cfg: tag or card, as `timm.create_model` passes it on.
        pretrained_cfg_overlay: entries of the card to replace.
        **kwargs: options of `regulate.RegulatorConfig`; all others go to timm.

    Raises:
        ValueError, TypeError: an option has a wrong value.
        CheckpointError: the weights hold regulators that these options do not make.
    """
    config = RegulatorConfig(**{name: kwargs.pop(name) for name in OPTIONS if name in kwargs})
    card = resolve_pretrained_cfg(PREFIX + architecture, pretrained_cfg, pretrained_cfg_overlay)
    regulators: dict[str, Tensor] = {}
    given = card
    if pretrained and not card.custom_load:
        backbone, regulators = split(weights_of(card, kwargs.get("cache_dir")))
        given = dataclasses.replace(card, source=None, state_dict=backbone)
    model: nn.Module = model_entrypoint(architecture)(pretrained=pretrained, pretrained_cfg=given, **kwargs)
    _name_source(model, card)
    plan = make_plan(model, config)
    plan.warn_if_wide()
    prepare(model, plan, config).install(model)
    if regulators:
        fill(model, regulators, partial=bool(kwargs.get("features_only")))
    return enlist(model, plan)


def _name_source(model: nn.Module, card: PretrainedCfg) -> None:
    """Write into a network's card where its weights came from, not the weights. In place."""
    own: Any = model.pretrained_cfg
    for name in _SOURCE:
        own.pop(name, None)
    own.update({name: value for name in _SOURCE if (value := getattr(card, name)) is not None})
