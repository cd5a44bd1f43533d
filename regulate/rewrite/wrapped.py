"""The roles of modules in a regulated network: block, container, module at a read or write point.

Each wraps one call; the user's code inside stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .._compat.compiler import assign
from .._compat.operators import tree_leaves
from ..errors import BlockCallError
from ..nn.hiding import HidesRegulator
from ..utils.classes import Forward, Part, leave
from .carrier import (
    THREADS,
    Chain,
    Frame,
    Memory,
    Place,
    Scope,
    first_tensor,
    held,
    memory_for,
    replace,
    scope_of,
)
from .disable import is_off
from .idle import warn_if_idle
from .lookup import PLACE, RECORD
from .points import check_points
from .recompute import forget_after_backward, is_repeated, note, noted


def _regulator(block: nn.Module, place: Place) -> nn.Module:
    """Return the block's fusion, in the first block with the cell of the stage."""
    found = block._modules.get("regulator")
    # An attribute, not a child: a wrapper in the fusion's place, such as peft's modules_to_save, hands it on.
    if found is None or (place.index == 0 and getattr(found, "cell", None) is None):
        raise BlockCallError(
            f"block {place.index} of {place.chain.name} calls its {'regulator' if found is None else 'cell'}, which "
            "was removed; call unregulate(model) to take regulators out, and disabled(model) to switch them off"
        )
    return found


def _before(place: Place, args: Any) -> Memory | None:
    """Return the memory that the block before left; None for the first block, which begins one."""
    if place.index == 0:
        return None
    found = memory_for(place.chain, args, is_repeated()) or _begun(place)
    if found is None or (found.index >= place.index and not _may_repeat(place, found, args)):
        raise BlockCallError(_reentrant(place) if is_repeated() else _out_of_order(place, found))
    if torch.is_grad_enabled() and not found.tracked and _needs_gradient(args):
        raise BlockCallError(_reentrant(place))
    note(place, found, args)
    return found


def _may_repeat(place: Place, last: Memory, args: Any) -> bool:
    """Check whether a container's own code calls a block behind a later one. A hook's call is beside the pass."""
    entering = first_tensor(args)
    left, came = (None if out is None else out() for out in (last.out, last.came))
    is_beside = entering is not None and entering is not left and (left is not None or entering is came)
    return isinstance(scope_of(place.chain), Scope) and not is_beside


def _begun(place: Place) -> Memory | None:
    """Return a memory that begins with a later block: the container's own code has left out those before it.

    Which blocks run, and in what order, is up to the container; the memory goes from one to the next as they come.
    """
    scope = scope_of(place.chain)
    if not isinstance(scope, Scope):
        return None
    first = next((module for module in scope.owner.modules() if _is_first(module, place.chain)), None)
    cell = None if first is None else getattr(first._modules.get("regulator"), "cell", None)
    if first is None or cell is None:
        raise BlockCallError(
            f"the first block of {place.chain.name} holds the cell of the whole stage, and was exchanged or removed; "
            "call unregulate(model) before blocks are exchanged, and regulate(model) after it"
        )
    return None if _is_sharded(first) else Memory(place.chain, cell, None, -1, True, is_repeated())


def _is_first(module: nn.Module, chain: Chain) -> bool:
    place: Place | None = module.__dict__.get(PLACE)
    return place is not None and place.chain is chain and place.index == 0


def _lasting(cell: Any, block: nn.Module) -> Any:
    """Return the cell as all blocks of the chain can call it.

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
    # What a reentrant checkpoint puts out is no leaf; a leaf is where a network was cut.
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf for leaf in tree_leaves(args))


def _out_of_order(place: Place, last: Memory | None) -> str:
    ran = "no block before it has run" if last is None else f"the last one to run was block {last.index}"
    return (
        f"block {place.index} of {place.chain.name} needs the memory of the blocks before it, and {ran} in this pass; "
        "call the stage that holds it, or its blocks in order (in a hook, inside `with disabled(model)`), or "
        "unregulate(model) first"
    )


def _reentrant(place: Place) -> str:
    return (
        f"the blocks before block {place.index} of {place.chain.name} ran without gradients, as reentrant gradient "
        "checkpointing runs them, or are not found again; use use_reentrant=False, and begin the checkpoint with the "
        "block, without a cast or hook before it, or checkpoint the whole stage"
    )


class Block(HidesRegulator):
    """A regulated block: a call of it runs one step of the memory."""

    def _regulate_run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block's own forward with a frame in which its read and write points meet."""
        place: Place | None = self.__dict__.get(PLACE)
        if place is None or is_off(place.chain):
            return forward(self, *args, **kwargs)
        check_points(self, place)
        regulator = _regulator(self, place)
        if place.index == 0:
            warn_if_idle(regulator, place.chain)
        if not torch.compiler.is_compiling():
            place.chain.ran = True
        repeated = noted(place, (args, kwargs))
        if (repeated or place.index == 0) and is_repeated():
            # What second runs of later blocks left would hold their maps while this one makes its own.
            replace(place.chain, None, None)
        before = None if repeated else _before(place, (args, kwargs))
        entering = repeated or before or Memory(place.chain, _lasting(regulator.cell, self), None, -1, True)
        outer = THREADS.stack.top
        frame = Frame(outer, place, regulator, entering.cell, entering.state)
        after: Memory | None = None
        try:
            assign(THREADS.stack, "top", frame)
            out = forward(self, *args, **kwargs)
            # Behind the last block the memory is gone.
            if place.index + 1 < place.chain.length:
                repeats, tracked = is_repeated(), torch.is_grad_enabled()
                links = held(out), entering.out
                after = Memory(place.chain, entering.cell, frame.state, place.index, tracked, repeats, *links)
        finally:
            assign(THREADS.stack, "top", outer)
            replace(place.chain, before, after)
        if after is not None and after.repeated:
            forget_after_backward(after)
        return out


class Container(Part):
    """A module that runs regulated stages: a call of it begins and ends their memory."""

    def _regulate_run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a container's own forward with memories that end with it, however it ends."""
        record = self.__dict__.get(RECORD)
        if record is None:  # a slice of a Sequential, made anew from its class
            return forward(self, *args, **kwargs)
        outer = THREADS.stack.top
        try:
            assign(THREADS.stack, "top", Scope(outer, self, record.chains))
            return forward(self, *args, **kwargs)
        finally:
            assign(THREADS.stack, "top", outer)


def release(module: nn.Module, attribute: str) -> None:
    """Take one role from a module, and the attribute that goes with it. In place."""
    vars(module).pop(attribute, None)
    leave(module, {PLACE: Block, RECORD: Container}[attribute])
