"""The memory on its way from block to block, while a forward pass lasts.

The user's own `forward` runs. A block opens a `Frame` for the time of its call; the module at its read
point leaves the map there, the module at its write point takes the fused map in its input's place. From
one block to the next the state travels in a `Memory`, which a `Scope`, the running call of the container
around the blocks, holds. Nothing is kept on a module, so threads and replicas do not meet.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import TensorWeakRef

from .._compat.autograd import saving_hooks
from .._compat.compiler import assign
from .._compat.operators import tree_leaves
from ..errors import BlockCallError
from ..kernels.reference import State
from ..kernels.spans import Spans
from .alignment import aligned, fitting


class Chain:
    """The identity of one stage in one network: its blocks, points and container refer to it.

    A copied or unpickled network gets chains of its own; replicas and shallow copies share theirs.

    Args:
        name: what error messages call the stage.
        length: how many blocks share the cell.
    """

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length
        self.looked_at = False  # by `idle.warn_if_idle`
        self.ran = False  # outside of compiled code
        self.off = Spans()  # uses of `disabled`, see `disable.py`

    def __reduce__(self) -> tuple[Any, ...]:
        return Chain, (self.name, self.length)


@dataclass(frozen=True)
class Place:
    """A block's place in its chain, and how its read map comes to the write grid.

    Args:
        chain: the stage.
        index: 0 for the first block, which owns the cell and begins the memory.
        stride: for each spatial axis, how much finer the read grid is than the write grid.
        crop: whether the subsampled map must be cut to the write grid.
        read: path below the block of the module at the read point.
        write: path below the block of the module at the write point.
    """

    chain: Chain
    index: int
    stride: tuple[int, ...]
    crop: bool
    read: str
    write: str


@dataclass(eq=False)
class Memory:
    """The state of a chain behind one of its blocks.

    Args:
        chain: the stage.
        cell: its shared cell, or a function that runs it.
        state: what the cell returned last, None before the first step.
        index: the block that ran last.
        tracked: whether that block ran with gradients enabled.
        repeated: whether it ran a second time, in a backward pass. Such a memory is for second runs alone.
        out: what that block put out, as `held` made it.
        came: likewise of the block before it.
    """

    chain: Chain
    cell: Any
    state: State | None
    index: int
    tracked: bool
    repeated: bool = False
    out: TensorWeakRef | None = None
    came: TensorWeakRef | None = None


class Scope:
    """A running call of a container: it holds the memories of its chains, and forgets them at its end.

    Args:
        outer: what ran before it on this thread.
        owner: the container.
        chains: the stages that it runs.
    """

    place = None

    def __init__(self, outer: Scope | Frame | None, owner: nn.Module, chains: tuple[Chain, ...]) -> None:
        self.outer, self.owner, self.chains = outer, owner, chains
        self.memories: tuple[Memory, ...] = ()


class Frame:
    """A running call of a block.

    Args:
        outer: what ran before it on this thread.
        place: the block's place.
        regulator: the block's fusion.
        cell: the chain's cell.
        state: the state that entered the block.
    """

    def __init__(self, outer: Scope | Frame | None, place: Place, regulator: nn.Module, cell: Any, state: Any) -> None:
        self.outer, self.place, self.regulator, self.cell = outer, place, regulator, cell
        self.state: State | None = state
        self.read: Tensor | None = None
        self.fused = False
        # What saved tensors pass through, where the block began and where it was read. Other hooks: it checkpoints.
        self.hooks = self.read_hooks = None if torch.compiler.is_compiling() else saving_hooks()


class Stack:
    """What runs on a thread: the innermost call, and memories of blocks that are called by hand."""

    def __init__(self) -> None:
        self.top: Scope | Frame | None = None
        self.memories: tuple[Memory, ...] = ()


class _Threads(threading.local):
    """Holds a stack for each thread: what compiled code sets on a `threading.local` itself, torch.compile forgets."""

    def __init__(self) -> None:
        self.stack = Stack()


THREADS = _Threads()


def scope_of(chain: Chain) -> Scope | Stack:
    """Return the innermost running container of a chain; without one, the thread's loose memories."""
    at = THREADS.stack.top
    while at is not None:
        if isinstance(at, Scope) and any(one is chain for one in at.chains):
            return at
        at = at.outer
    return THREADS.stack


def held(out: Any) -> TensorWeakRef | None:
    """Return a weak reference to a block's first output, by which the next block knows what it goes on with."""
    return None if torch.compiler.is_compiling() or (first := first_tensor(out)) is None else TensorWeakRef(first)


def first_tensor(tree: Any) -> Tensor | None:
    """Return the first tensor in arguments or results."""
    found = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not isinstance(leaf, fx.Proxy))
    return next(found, None)


def memory_for(chain: Chain, args: Any, repeated: bool) -> Memory | None:
    """Return the memory that a block of a chain goes on with, None if no block of it has run.

    Second runs, in a backward pass, go on with what second runs left.

    Raises:
        BlockCallError: passes take turns, and which one the arguments belong to cannot be told.
    """
    memories = [one for one in scope_of(chain).memories if one.chain is chain and one.repeated == repeated]
    if len(memories) < 2:
        return memories[0] if memories else None
    entering = first_tensor(args)
    for memory in memories:
        if memory.out is not None and memory.out() is entering:
            return memory
    raise BlockCallError(
        f"{len(memories)} passes through {chain.name} take turns here, and the input of a block is the output of a "
        "block before it in none of them; hand on what a block returns as it is, or end one pass before the next begins"
    )


def replace(chain: Chain, old: Memory | None, new: Memory | None) -> None:
    """Put a memory in another one's place; None forgets it, and None as the old one begins a pass.

    With that, passes that nobody can go on with are forgotten: those that ended, and without a container, which ends
    them all, or in a backward pass, those whose output is gone.
    """
    scope = scope_of(chain)
    going = [one for one in scope.memories if one is not old and one.index < one.chain.length]
    kept = [one for one in going if one.chain is not chain or _stays(one, scope)]
    assign(scope, "memories", tuple(kept) if new is None else (*kept, new))


def _stays(memory: Memory, scope: Scope | Stack) -> bool:
    lives = memory.out is not None and memory.out() is not None
    return lives or (isinstance(scope, Scope) and not memory.repeated)


def frame_of(place: Place) -> Frame | None:
    """Return the running call of a block, None if it does not run."""
    at = THREADS.stack.top
    while at is not None:
        if at.place is not None and at.place is place:
            return at  # type: ignore[return-value]
        at = at.outer
    return None


def pass_read(frame: Frame, x: Any) -> None:
    """Leave the map at the read point in the block's frame."""
    if frame.read is None:
        frame.read = x
        if not torch.compiler.is_compiling():
            frame.read_hooks = saving_hooks()


def pass_write(frame: Frame, x: Any) -> Any:
    """Run one step of the memory and return the fused map: Eq. (2) and (3).

    Args:
        frame: the block's running call.
        x: the map that enters the write point, (N, M, H, W).

    Raises:
        BlockCallError: the block's own code did not pass its read point before.
    """
    place = frame.place
    if frame.fused:
        raise BlockCallError(
            f"a block is fused once, but block {place.index} of {place.chain.name} called the module at its write "
            f"point, {place.write}, twice in one forward pass; unregulate(model) and leave that stage out with "
            "stages=[...]"
        )
    if frame.read is None:
        raise BlockCallError(
            f"a block reads its memory before it writes, but block {place.index} of {place.chain.name} called "
            f"{place.write} before {place.read}; unregulate(model) and leave that stage out with stages=[...]"
        )
    frame.fused = True
    read = aligned(frame.read, x, place.stride, place.crop)
    fused, frame.state = frame.regulator(x, frame.cell(read, fitting(frame.state, read)))
    return fused
