"""Whether a module may be bypassed: whether calling it runs the forward of its class and nothing else."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """True if `module(...)` is `cls.forward` alone: no hook, no wrapper, no forward of somebody's own."""
    hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
    own = type(module).forward is cls.forward and "forward" not in vars(module)
    return own and not hooks and not _has_any_global_hook()  # type: ignore[no-untyped-call]
