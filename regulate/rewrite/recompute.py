"""Gradient checkpointing by block: the state that entered a block, for its second run in the backward pass.

Non-reentrant checkpointing runs a block again while the backward pass lasts and only its values count: the
gradient flows through the graph of the first run. The state that entered the block is therefore noted where
the second run finds it, on the storage of the block's input, which lives exactly as long as the checkpoint.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compat.autograd import after_backward, in_backward, running_node_number, saving_hooks, sequence_number
from .._compat.operators import storage_of
from .carrier import Memory, Place, first_tensor

_NOTES = "_regulate_notes"
# An input that is used again and again keeps the last notes of each block only.
_KEPT = 4


@dataclass(frozen=True)
class _Note:
    place: Place
    number: int
    memory: Memory


def note(place: Place, memory: Memory, args: Any) -> None:
    """Remember the memory that enters a block, if the block may be run again in the backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or saving_hooks() is None:
        return
    storage = _storage(args)
    if storage is not None:
        state = None if memory.state is None else tuple(map(as_leaf, memory.state))
        values = Memory(memory.chain, memory.cell, state, memory.index, memory.tracked)
        held = getattr(storage, _NOTES, ())
        others, own = ([one for one in held if (one.place is place) == mine] for mine in (False, True))
        setattr(storage, _NOTES, (*others, *own[1 - _KEPT :], _Note(place, sequence_number(), values)))


def as_leaf(part: Tensor) -> Tensor:
    """Return a tensor for a second run, which saves what the first one did only if the same tensors need gradients."""
    return part.detach().requires_grad_(part.requires_grad)


def is_repeated() -> bool:
    """Check whether the running call is a second one, in a backward pass."""
    return not torch.compiler.is_compiling() and bool(in_backward())


def noted(place: Place, args: Any) -> Memory | None:
    """Return the memory that entered a block in the run that is repeated; None outside of a backward pass."""
    # Where a torch does not tell whether it is inside of one, a note is enough: other runs have inputs of their own.
    if torch.compiler.is_compiling() or in_backward() is False or not place.index:
        return None
    number = running_node_number()
    notes = [one for one in getattr(_storage(args), _NOTES, ()) if one.place is place]
    # In a checkpoint within a checkpoint, the first run is itself a second one, and later than the node.
    before = [one for one in notes if not number or one.number <= number] or notes[-1:] * (len(notes) < _KEPT)
    return before[-1].memory if before else None


def forget_after_backward(memory: Memory) -> None:
    """Free the state that a second run of blocks left behind, when the backward pass that asked for it ends."""
    # Weakly: the state holds the graph of the second run, and so all that the run saved.
    left = weakref.ref(memory)

    def forget() -> None:
        memory = left()
        if memory is not None:
            memory.state, memory.cell, memory.index = None, None, memory.chain.length

    after_backward(forget)


def _storage(args: Any) -> Any:
    """Return the storage of a block's first tensor."""
    first = first_tensor(args)
    return None if first is None else storage_of(first)
