"""What a command is doing, and for how long: one line on a terminal, nothing in a file or a pipe."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 0.5  # seconds: work that takes less shows nothing


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on standard error what is being done, with the seconds it has taken; erase it at the end.

    Args:
        what: the work, as a participle: "planning resnet152".
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    clock = threading.Thread(target=_tick, args=(what, done), daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()


def _tick(what: str, done: threading.Event) -> None:
    start = time.monotonic()
    while not done.wait(_PATIENCE):
        _show(f"{what}, {time.monotonic() - start:.0f} s")
    erase()


def step(what: str, number: int, count: int) -> None:
    """Show which of several equal steps begins, without a thread that would disturb a measurement."""
    _show(f"{what} {number} of {count}")


def erase() -> None:
    """Take the line away."""
    _show("")


def _show(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")  # to the line's begin, and erase to its end
        sys.stderr.flush()
