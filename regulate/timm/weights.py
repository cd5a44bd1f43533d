"""Pretrained weights of timm: the backbone's tensors, which timm loads, and those of regulators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from timm.models import load_pretrained
from torch import Tensor, nn

from .. import CheckpointError, regulator_state_dict

Tensors = dict[str, Tensor]


class _Taken(Exception):
    """Ends timm's loading where it has the weights."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors


def weights_of(card: Any, cache_dir: Any = None) -> Mapping[str, Tensor]:
    """Fetch the weights that a card names, from wherever timm takes them: hub, address, folder, file or memory.

    Args:
        card: timm's `PretrainedCfg`.
        cache_dir: of what is downloaded.

    Raises:
        RuntimeError: the card names none; whatever timm raises where they cannot be had.
    """

    def take(tensors: Mapping[str, Tensor], _: nn.Module) -> NoReturn:
        raise _Taken(tensors)

    where = {} if cache_dir is None else {"cache_dir": cache_dir}
    try:
        load_pretrained(nn.Module(), card.to_dict(), filter_fn=take, **where)
    except _Taken as taken:
        return taken.tensors
    raise AssertionError("timm loaded weights without its filter")


def split(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Split weights into those of the backbone and those of regulators."""
    of_regulators = {key: value for key, value in tensors.items() if ".regulator." in f".{key}"}
    return {key: value for key, value in tensors.items() if key not in of_regulators}, of_regulators


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, partial: bool) -> None:
    """Give a network the tensors of its regulators. In place.

    Args:
        model: a regulated network.
        tensors: by their names in the whole network.
        partial: the network is a part of that, under names that timm's feature extractors make of them.

    Raises:
        CheckpointError: the tensors are of other regulators.
    """
    own = regulator_state_dict(model)
    given = {_plain(key): value for key, value in tensors.items()}
    wanted = {key: given[_plain(key)] for key in own if _plain(key) in given}
    differing = [key for key, value in own.items() if key not in wanted or value.shape != wanted[key].shape]
    differing += [] if partial else sorted({_plain(key) for key in tensors} - {_plain(key) for key in own})
    if differing:
        raise CheckpointError(
            f"pretrained weights with regulators fill a network that was regulated alike, and {differing[0]} is not "
            "the same there; pass the options that theirs was made with (cell=..., stages=...)"
        )
    model.load_state_dict(wanted, strict=False)


def _plain(key: str) -> str:
    """Return a tensor's name without what feature extractors change: a prefix, and dots that become underscores."""
    return re.sub(r"^(model|body)\.", "", key).replace(".", "_")
