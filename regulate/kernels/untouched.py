"""Whether a module may be bypassed: whether calling it runs the forward of its class and nothing else."""

from __future__ import annotations

from torch import nn

from .. import _compat


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """True if `module(...)` is `cls.forward` alone: no hook, no wrapper, no forward of somebody's own."""
    own = type(module).forward is cls.forward and "forward" not in module.__dict__
    return own and not _compat.has_hooks(module)
