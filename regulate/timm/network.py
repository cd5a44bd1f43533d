"""The role of a network that timm built regulated: what would overwrite the start puts the regulators back on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import Block, Plan, is_regulated, regulator_state_dict
from ..nn.factory import start
from ..rewrite.lookup import regulators
from ..utils.classes import Part, become
from ..utils.modes import private_rng

_START = "_regulate_start"


@dataclass(frozen=True)
class Start:
    """How the regulators of a network start.

    Args:
        blocks: the regulated blocks, with what is known of the maps at their write points.
        init: the option.
    """

    blocks: tuple[Block, ...]
    init: str


class Network(Part):
    """A network that takes the state of the original one as well."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`. A state that knows no regulators leaves them at their start."""
        if not _is_plain_state(self, state_dict):
            return super().load_state_dict(state_dict, *args, **kwargs)
        whole = copy.copy(state_dict)  # with its _metadata
        whole.update(regulator_state_dict(self))  # type: ignore[attr-defined]
        result = super().load_state_dict(whole, *args, **kwargs)
        restart(self)
        return result


class Initialised(Network):
    """A network with an `init_weights` of its own."""

    def init_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own, for everything but the regulators, which are at their start afterwards."""
        if not is_regulated(self):
            return super().init_weights(*args, **kwargs)  # type: ignore[misc]
        before = {key: value.clone() for key, value in regulator_state_dict(self).items()}
        result = super().init_weights(*args, **kwargs)  # type: ignore[misc]
        super().load_state_dict(before, strict=False)
        restart(self)
        return result


def enlist(model: nn.Module, plan: Plan) -> nn.Module:
    """Give a regulated network that role. In place; returns the network."""
    vars(model)[_START] = Start(plan.blocks, plan.options["init"])
    become(model, Initialised if hasattr(model, "init_weights") else Network)
    return model


def restart(model: nn.Module) -> None:
    """Put every fusion at its start for the norms that the network has now. In place; cells keep their values."""
    begun: Start = vars(model)[_START]
    there = dict(regulators(model))
    with private_rng(None, 0):
        for block in (one for one in begun.blocks if f"{one.name}.regulator" in there):
            start(there[f"{block.name}.regulator"], block, model, begun.init)  # type: ignore[arg-type]


def _is_plain_state(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Check whether a state has all of the regulated blocks but nothing of their regulators."""
    roots = tuple(path for path, _ in regulators(model))
    blocks = tuple(root.removesuffix("regulator") for root in roots)
    own = [key for key in model.state_dict() if key.startswith(blocks)]
    return bool(roots) and all((key in state) != key.startswith(roots) for key in own)
