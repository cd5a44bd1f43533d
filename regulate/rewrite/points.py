"""The modules at the read and the write point of a block: where the memory is read off and fused in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from ..errors import BlockCallError
from ..utils.classes import Forward, Part, become, leave
from ..utils.paths import module_at
from .carrier import Chain, Frame, Place, frame_of, pass_read, pass_write
from .inside import frame_again, keep
from .lookup import POINTS, Point

# No union: before torch 2.9 its compiler knows none.
_MAPS = (torch.Tensor, fx.Proxy)


class Pointed(Part):
    """A module at a read or write point."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the input over at a read point; take the fused map in its place at a write point."""
        if args or kwargs:
            for point in self.__dict__.get(POINTS, ()):
                frame = frame_of(point.place) or frame_again(point.place, point.writes, _first(args, kwargs))
                if frame is not None:
                    return _passed(super().__call__, point, frame, args, kwargs)
        return super().__call__(*args, **kwargs)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _passed(call: Forward, point: Point, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = _first(args, kwargs)
    if not isinstance(x, _MAPS):
        place = point.place
        raise BlockCallError(
            f"a module at a read or write point is called with its map first, and block {place.index} of "
            f"{place.chain.name} called the one at {place.write if point.writes else place.read} with a "
            f"{type(x).__name__} there; unregulate(model) and leave that stage out with stages=[...]"
        )
    if point.reads:
        pass_read(frame, x)
    if not point.writes:
        return call(*args, **kwargs)
    entering = frame.state
    fused = pass_write(frame, x)
    out = call(fused, *args[1:], **kwargs) if args else call(**{**kwargs, next(iter(kwargs)): fused})
    keep(frame, entering, out)
    return out


def check_points(block: nn.Module, place: Place) -> None:
    """Make sure that the modules at the points know it: another tool may have put its own in their place."""
    for path in {place.read, place.write}:
        module = module_at(block, path)
        if module is None:
            raise BlockCallError(
                f"block {place.index} of {place.chain.name} reads and writes its memory at {path}, which is gone; "
                "call unregulate(model) before modules of a regulated block are removed"
            )
        # Its class, too: users exchange it, or copy what is in `__dict__`.
        if not isinstance(module, Pointed) or not any(p.place is place for p in module.__dict__.get(POINTS, ())):
            _adopt(module, place, path)


def _adopt(module: nn.Module, place: Place, path: str) -> None:
    """Make a module that was put at a point after the rewrite, such as LoRA's, the module at that point."""
    if torch.compiler.is_compiling():
        raise BlockCallError(
            f"the module at {path} of block {place.index} of {place.chain.name} was replaced after regulate(model); "
            "run the network once outside of torch.compile, which lets the new one take part in the memory"
        )
    for inner in module.modules():
        forget_points(inner, [place.chain])
    mark(module, Point(place, path == place.read, path == place.write))


def forget_points(module: nn.Module, chains: Collection[Chain]) -> None:
    """Take the roles at points of some chains from a module; another network may share it. In place."""
    points = module.__dict__.get(POINTS, ())
    left = tuple(point for point in points if point.place.chain not in chains)
    if left:
        vars(module)[POINTS] = left
    elif points:
        vars(module).pop(POINTS)
        leave(module, Pointed)


def mark(module: nn.Module, point: Point) -> None:
    """Give a module a role at a point. In place."""
    vars(module)[POINTS] = (*module.__dict__.get(POINTS, ()), point)
    if not isinstance(module, Pointed):
        become(module, Pointed)
