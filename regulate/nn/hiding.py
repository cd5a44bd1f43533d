"""A block that is an `nn.Sequential` does not run its regulator as one of its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..utils.classes import Part


class HidesRegulator(Part):
    """A module that holds a regulator."""

    @classmethod
    def _regulate_members(cls, own: type) -> dict[str, Any]:
        """Keep the regulator out of what an `nn.Sequential` runs, counts and indexes."""
        if not issubclass(own, nn.Sequential):
            return {}
        kept = {"__iter__": _layers, "__len__": _length, "__getitem__": _layer}
        return {name: do for name, do in kept.items() if getattr(own, name) is getattr(nn.Sequential, name)}


def _own_layers(self: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in self._modules.items() if name != "regulator"]


def _layers(self: nn.Module) -> Iterator[Any]:
    return iter([layer for _, layer in _own_layers(self)])


def _length(self: nn.Module) -> int:
    return len(_own_layers(self))


def _layer(self: nn.Module, at: int | slice) -> Any:
    if isinstance(at, slice):
        return type(self)(OrderedDict(_own_layers(self)[at]))
    return _own_layers(self)[at][1]
