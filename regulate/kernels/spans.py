"""When `with` blocks were open, in autograd's count of nodes: for what a backward pass runs again."""

from __future__ import annotations

import threading
from typing import Any

from .._compat.autograd import in_backward, running_node_number, sequence_number

_OPEN = 2**63
# How many uses with gradients a backward pass can look back on.
_KEPT = 1024


class Spans:
    """The last uses of a `with` block, on all threads, the latest to begin last.

    Gradient checkpointing runs code a second time, inside of a backward pass and outside of the `with` block around
    the first run. The node whose backward asks for it tells by its number what was open when it was made.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Thread, begin, end, value.
        self._held: tuple[tuple[int | None, int, int, Any], ...] = ()

    def begin(self, value: Any) -> int:
        """Note that a block has begun, under an object of its own; return the number that `end` takes."""
        begun = sequence_number()
        with self._lock:
            self._held = (*self._held, (_thread(), begun, _OPEN, value))[-_KEPT:]
        return begun

    def end(self, value: Any, begun: int) -> None:
        """Note that it has ended. Where no node was made, as without gradients, there is nothing to look back on."""
        ended = sequence_number()
        with self._lock:
            self._held = tuple(
                (of, first, ended if one is value else last, one)
                for of, first, last, one in self._held
                if one is not value or ended > begun
            )

    def around(self, number: int) -> list[Any]:
        """Return the values of the blocks that were open when this thread made a node, the latest last."""
        thread = _thread()
        return [one for of, first, last, one in self._held if first <= number < last and thread in (of, None)]


def repeated_node() -> int:
    """Return the number of the node whose backward runs here, 0 outside of a backward pass."""
    return running_node_number() if in_backward() else 0


def _thread() -> int | None:
    """Return this thread, whose numbers of autograd are its own; None for one of autograd's, which serve others."""
    thread = threading.current_thread()
    return None if isinstance(thread, threading._DummyThread) else thread.ident
