"""Whether a module may be bypassed: whether calling it runs the forward of its class and nothing else."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_module

# torch has a function that asks for them, but not in its older versions.
_EVERYWHERE = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))

# The compiler of torch before 2.7 cannot trace the questions below; compiled networks take the readable form there.
_UNTRACEABLE = not hasattr(torch.compiler, "is_exporting")


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """True if `module(...)` is `cls.forward` alone: no hook, no wrapper, no forward of somebody's own."""
    if _UNTRACEABLE and torch.compiler.is_compiling():
        return False
    hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
    own = type(module).forward is cls.forward and "forward" not in vars(module)
    return own and not hooks and not any(getattr(torch_module, name) for name in _EVERYWHERE)
