"""Whether a module may be bypassed: whether calling it runs the forward of its class and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from .. import _compat

# The compiler of torch before 2.7 cannot trace the questions below; compiled networks take the readable form there.
_UNTRACEABLE = not hasattr(torch.compiler, "is_exporting")


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """True if `module(...)` is `cls.forward` alone: no hook, no wrapper, no forward of somebody's own."""
    if _UNTRACEABLE and torch.compiler.is_compiling():
        return False
    own = type(module).forward is cls.forward and "forward" not in vars(module)
    return own and not _compat.has_hooks(module)
