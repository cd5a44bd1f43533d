"""Classes and hooks of torch's modules, names of torch.fx, and how timm writes a model down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from .lookup import symbol

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_ON_OUTPUT = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_HOOKS_EVERYWHERE = tuple(f"_global{name}" for name in _HOOKS)
_modules: Any = symbol("nn.modules.module")
# How torch.fx begins the names of constants that it puts on the module that it traces.
FX_CONSTANT = "_tensor_constant"

# Base classes. Without them: torch's own classes that have them, and what is derived from these.
if TYPE_CHECKING:
    BatchNorm = nn.modules.batchnorm._BatchNorm
    NormWithStatistics = nn.modules.batchnorm._NormBase
    Convolution = nn.modules.conv._ConvNd
else:
    BatchNorm = symbol("nn.modules.batchnorm._BatchNorm") or (
        nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    )
    NormWithStatistics = symbol("nn.modules.batchnorm._NormBase") or (
        BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
    )
    Convolution = symbol("nn.modules.conv._ConvNd") or (
        nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    )


class NoParameter:
    """A mixin for symbols: `isinstance(symbol, nn.Parameter)` asks for these, and would record the question."""

    _is_param = _is_buffer = False


def moves_in_training(module: nn.Module) -> bool:
    """Check whether a pass in train mode changes a module's buffers: a norm's statistics, a spectral norm's vectors."""
    held = [name for name, buffer in module._buffers.items() if buffer is not None]
    return any(name == "running_mean" or name.endswith("_u") for name in held)


def is_watched(module: nn.Module) -> bool:
    """Check whether hooks of a module's own see what it puts out. Without the symbols: yes."""
    return any(getattr(module, name, True) for name in _HOOKS_ON_OUTPUT)


def drop_hooks(module: nn.Module) -> bool:
    """Remove a module's own hooks and say whether it had forward hooks. In place. Without the symbols: none, no."""
    had = any(getattr(module, name, None) for name in ("_forward_hooks", "_forward_pre_hooks"))
    for name in (*_HOOKS, *_HOOK_OPTIONS):
        getattr(module, name, {}).clear()
    return had


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Keep the hooks of all modules out of the body, and put them back. Without the symbols: they run.

    They are the process's: like torch.fx while it traces, this is seen by other threads.
    """
    every = [getattr(_modules, name, {}) for name in _HOOKS_EVERYWHERE]
    held = [dict(hooks) for hooks in every]
    for hooks in every:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(every, held, strict=True):
            added = dict(hooks)
            hooks.clear()
            hooks.update({**before, **added})


def timm_config_writer() -> Callable[..., Any] | None:
    """Return timm's function that writes down how it built a model. Without the symbol: None."""
    with suppress(ImportError):
        return getattr(import_module("timm.models._hub"), "save_config_for_hf", None)
    return None
