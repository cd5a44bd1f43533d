"""A block that is an `nn.Sequential` does not run its regulator as one of its layers."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..utils.classes import Part


class HidesRegulator(Part):
    """A module that holds a regulator."""

    @classmethod
    def _regulate_members(cls, own: Any) -> dict[str, Any]:
        """Keep the regulator out of what an `nn.Sequential` runs, counts, indexes and edits; let it follow `train`."""
        made: dict[str, Any] = {} if own.train is nn.Module.train else {"train": _following(own)}
        if issubclass(own, nn.Sequential):
            kept = {"__iter__": _layers, "__len__": _length, "__getitem__": _layer}
            made |= {name: do for name, do in kept.items() if getattr(own, name) is getattr(nn.Sequential, name)}
            made |= {name: _beside(own, name) for name in _EDITS if hasattr(own, name)}
        return made


# They number the layers anew.
_EDITS = ("__delitem__", "__imul__", "append", "extend", "insert", "pop")


def _following(own: Any) -> Callable[..., Any]:
    """Return `train` of a class that has its own, which may list the submodules that it knows."""

    @functools.wraps(own.train)
    def train(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        done = own.train(self, *args, **kwargs)
        regulator = self._modules.get("regulator")
        if regulator is not None and regulator.training != self.training:
            regulator.train(self.training)
        return done

    return train


def _beside(own: Any, name: str) -> Callable[..., Any]:
    """Return a method that edits the layers of an `nn.Sequential`, while the regulator is none of them."""
    method = getattr(own, name)

    @functools.wraps(method)
    def edit(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        regulator = self._modules.pop("regulator", None)
        try:
            return method(self, *args, **kwargs)
        finally:
            if regulator is not None:
                self._modules["regulator"] = regulator

    return edit


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
