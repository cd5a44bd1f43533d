"""The roles of modules in a regulated network: block, container, module at a read or write point.

Each wraps one call; the user's code inside stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from .._compat import assign, tree_leaves
from ..errors import BlockCallError
from ..nn.hiding import HidesRegulator
from ..utils.classes import Forward, Part, become, leave
from .carrier import (
    STACK,
    Chain,
    Frame,
    Memory,
    Place,
    Scope,
    frame_of,
    held,
    memory_for,
    pass_read,
    pass_write,
    replace,
    scope_of,
)
from .disable import is_off
from .inside import frame_again, keep
from .lookup import PLACE, POINTS, RECORD, Point
from .recompute import forget_after_backward, is_repeated, note, noted

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


def run_container(self: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a container's own forward with memories that end with it, however it ends."""
    record = self.__dict__.get(RECORD)
    if record is None:  # a slice of a Sequential, made anew from its class
        return forward(self, *args, **kwargs)
    outer = STACK.top
    try:
        assign(STACK, "top", Scope(outer, self, record.chains))
        return forward(self, *args, **kwargs)
    finally:
        assign(STACK, "top", outer)


def run_block(self: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block's own forward with a frame in which its read and write points meet."""
    place: Place | None = self.__dict__.get(PLACE)
    if place is None or is_off(place.chain):
        return forward(self, *args, **kwargs)
    _check_points(self, place)
    regulator = _regulator(self, place)
    repeated = noted(place, (args, kwargs))
    if (repeated or place.index == 0) and is_repeated():
        # What second runs of later blocks left would hold their maps while this one makes its own.
        replace(place.chain, None, None)
    before = None if repeated else _before(place, (args, kwargs))
    entering = repeated or before or Memory(place.chain, _lasting(regulator.cell, self), None, -1, True)
    outer = STACK.top
    frame = Frame(outer, place, regulator, entering.cell, entering.state)
    finished = False
    try:
        assign(STACK, "top", frame)
        out = forward(self, *args, **kwargs)
        finished = True
    finally:
        assign(STACK, "top", outer)
        if not finished:
            replace(place.chain, before, None)
    repeats, tracked = is_repeated(), torch.is_grad_enabled()
    after = Memory(place.chain, entering.cell, frame.state, place.index, tracked, repeats, held(out))
    # Behind the last block the memory is gone.
    last = place.index + 1 == place.chain.length
    replace(place.chain, before, None if last else after)
    if repeats and not last:
        forget_after_backward(after)
    return out


def _regulator(block: nn.Module, place: Place) -> nn.Module:
    """The block's fusion, in the first block with the cell of the stage."""
    found = block._modules.get("regulator")
    whole = found is not None and (place.index > 0 or found._modules.get("cell") is not None)
    if found is None or not whole:
        raise BlockCallError(
            f"block {place.index} of {place.chain.name} calls its {'regulator' if found is None else 'cell'}, which "
            "was removed; call unregulate(model) to take regulators out, and disabled(model) to switch them off"
        )
    return found


def _before(place: Place, args: Any) -> Memory | None:
    """The memory that the block before left; None for the first block, which begins one."""
    if place.index == 0:
        return None
    found = memory_for(place.chain, args, is_repeated()) or _begun(place)
    backwards = found is not None and found.index >= place.index and not isinstance(scope_of(place.chain), Scope)
    if found is None or backwards:
        raise BlockCallError(_reentrant(place) if is_repeated() else _called_alone(place))
    if torch.is_grad_enabled() and not found.tracked and _needs_gradient(args):
        raise BlockCallError(_reentrant(place))
    note(place, found, args)
    return found


def _begun(place: Place) -> Memory | None:
    """A memory that begins with a later block: the container's own code has left out those before it.

    Which blocks run, and in what order, is up to the container; the memory goes from one to the next as they come.
    """
    scope = scope_of(place.chain)
    if not isinstance(scope, Scope):
        return None
    stages = zip(vars(scope.owner)[RECORD].stages, scope.chains, strict=True)
    first = scope.owner.get_submodule(next(stage.blocks[0].name for stage, of in stages if of is place.chain))
    if _is_sharded(first):
        return None
    return Memory(place.chain, first.get_submodule("regulator").cell, None, -1, True, is_repeated())


def _lasting(cell: Any, block: nn.Module) -> Any:
    """The cell as all blocks of the chain can call it.

    FSDP gathers the weights of the first block, the cell's among them, while that block runs and frees them behind
    it. The other blocks then compute with copies, through which the gradient flows back to the first block.
    """
    if not _is_sharded(block):
        return cell
    weights = {name: tensor.clone() for name, tensor in (*cell.named_parameters(), *cell.named_buffers())}
    return lambda x, state: functional_call(cell, weights, (x, state))


def _is_sharded(block: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(block).__mro__)


def _needs_gradient(args: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(args))


def _called_alone(place: Place) -> str:
    return (
        f"block {place.index} of {place.chain.name} needs the memory of the blocks before it, and no block before it "
        "has run in this pass; call the stage that holds it, or its blocks in order, or unregulate(model) first"
    )


def _reentrant(place: Place) -> str:
    return (
        f"the blocks before block {place.index} of {place.chain.name} ran without gradients, as reentrant gradient "
        "checkpointing runs them, and the memory's gradient would be lost; use use_reentrant=False, or checkpoint the "
        "whole stage"
    )


def _check_points(block: nn.Module, place: Place) -> None:
    """Make sure that the modules at the points know it: another tool may have put its own in their place."""
    for path in {place.read, place.write}:
        module = block
        for name in path.split("."):
            child = module._modules.get(name)
            if child is None:
                raise BlockCallError(
                    f"block {place.index} of {place.chain.name} reads and writes its memory at {path}, which is gone; "
                    "call unregulate(model) before modules of a regulated block are removed"
                )
            module = child
        if not any(point.place is place for point in module.__dict__.get(POINTS, ())):
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
        release(module, POINTS)


def mark(module: nn.Module, point: Point) -> None:
    """Give a module a role at a point. In place."""
    vars(module)[POINTS] = (*module.__dict__.get(POINTS, ()), point)
    if not isinstance(module, Pointed):
        become(module, Pointed)


class Block(HidesRegulator):
    """A regulated block: a call of it runs one step of the memory."""

    _regulate_run = staticmethod(run_block)


class Container(Part):
    """A module that runs regulated stages: a call of it begins and ends their memory."""

    _regulate_run = staticmethod(run_container)


def release(module: nn.Module, attribute: str) -> None:
    """Take one role from a module, and the attribute that goes with it. In place."""
    vars(module).pop(attribute, None)
    leave(module, {POINTS: Pointed, PLACE: Block, RECORD: Container}[attribute])
