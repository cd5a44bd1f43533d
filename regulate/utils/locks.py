"""One plan at a time: torch.fx exchanges methods of `nn.Module` for all threads while it traces."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_TRACING = threading.RLock()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Let threads call these functions one after another; what they have in common is torch's tracer."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _TRACING:
            return function(*args, **kwargs)

    return run
