"""Gradient checkpointing inside a block: layers that run again in the backward pass, without their block.

A block's own forward may checkpoint some of its layers. In the second run of these nobody opens a frame, and without
one the module at the write point would take the map itself. What the first run fused with is therefore kept by the
autograd node of the write point's output, and so for as long as there can be a second run.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .._compat.autograd import in_checkpoint_function, running_node_number, saving_hooks, sequence_number
from ..errors import BlockCallError
from ..kernels.reference import State
from .carrier import Frame, Place, first_tensor
from .disable import is_off
from .recompute import as_leaf, is_repeated

_KEPT = "regulate"


class _Kept:
    """What a second run of the layers around a write point needs.

    Args:
        frame: the first run's.
        state: the state that entered it.
        number: autograd's sequence number behind the first run.
    """

    def __init__(self, frame: Frame, state: State | None, number: int) -> None:
        self.place, self.regulator, self.cell, self.number = frame.place, frame.regulator, frame.cell, number
        self.state = None if state is None else tuple(map(as_leaf, state))
        # A map that the same layers make is made anew by their second run, and not to be held until then.
        self.reads_again = frame.read_hooks is not None and frame.read_hooks == saving_hooks()
        self.read = as_leaf(frame.read) if isinstance(frame.read, Tensor) and not self.reads_again else None
        self.again: Frame | None = None

    def frame(self, writes: bool) -> Frame:
        """Return the frame of the second run that is going on, from its read point to its write point."""
        frame = self.again or Frame(None, self.place, self.regulator, self.cell, self.state)
        # Behind the write point it would hold the graph of the second run.
        self.again = None if writes else frame
        return frame


_alive: weakref.WeakSet[_Kept] = weakref.WeakSet()
_lock = threading.Lock()


def keep(frame: Frame, state: State | None, out: Any) -> None:
    """Keep what a second run needs, if layers around a block's write point are checkpointed by themselves.

    Args:
        frame: of the block's running call.
        state: that entered the block.
        out: what the module at the write point put out.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or frame.hooks == saving_hooks():
        return
    tensor = first_tensor(out)
    if tensor is not None and tensor.grad_fn is not None:
        kept = _Kept(frame, state, sequence_number())
        metadata: Any = tensor.grad_fn.metadata  # torch's stub takes the property for a method
        metadata[_KEPT] = kept
        with _lock:
            _alive.add(kept)


def frame_again(place: Place, writes: bool, x: Any) -> Frame | None:
    """Return a frame for a module at a point whose block does not run, but which a backward pass runs again.

    Args:
        place: the block's.
        writes: whether the module is at the write point; else it is at the read point alone.
        x: what it is called with.

    Raises:
        BlockCallError: the first run had no gradients, as in reentrant checkpointing.
    """
    # A block that never ran: the module is a copy outside of its network.
    if not is_repeated() or not place.chain.ran or is_off(place.chain):
        return None
    kept = _kept_for(place)
    if (writes and (kept is None or in_checkpoint_function())) or (in_checkpoint_function() and _is_made_within(x)):
        raise BlockCallError(
            f"block {place.index} of {place.chain.name} checkpoints layers around its "
            f"{'write' if writes else 'read'} point with use_reentrant=True, whose first run has no gradients, and the "
            "memory's gradient would be lost; use use_reentrant=False"
        )
    # Layers that run again as far as the read point have nothing to hand over.
    if kept is None or not (writes or kept.reads_again):
        return None
    frame = kept.frame(writes)
    if not kept.reads_again:
        frame.read = kept.read
    return frame


def _is_made_within(x: Any) -> bool:
    """Check whether the layers that run again have made a map themselves; what enters them is a leaf there."""
    return isinstance(x, Tensor) and x.requires_grad and not x.is_leaf


def _kept_for(place: Place) -> _Kept | None:
    """Return what the running node's pass has kept: the last that was kept before that node was made."""
    with _lock:
        found = sorted((one for one in _alive if one.place is place), key=lambda one: one.number)
    number = running_node_number()
    before = [one for one in found if not number or one.number <= number] or found[:1]
    return before[-1] if before else None
