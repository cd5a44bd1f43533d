"""One plan at a time: torch.fx exchanges methods of `nn.Module` for all threads while it traces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRACING = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let threads call these functions one after another; what they have in common is torch's tracer.

    A decorator: `@one_at_a_time()`.
    """
    with _TRACING:
        yield
