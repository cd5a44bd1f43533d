"""Where autograd and torch's modes are: backward pass, nodes, hooks of saved tensors, tracing, transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .lookup import symbol

_tracing: Callable[[], bool] | None = symbol("jit.is_tracing")
_graph_task: Callable[[], int] | None = symbol("_C._current_graph_task_id")
_autograd_node: Callable[[], Any] | None = symbol("_C._current_autograd_node")
_sequence_number: Callable[[], int] | None = symbol("autograd._get_sequence_nr")
_saving_hooks: Callable[[bool], Any] | None = symbol("_C._autograd._top_saved_tensors_default_hooks")
_engine: Any = symbol("autograd.Variable._execution_engine")
_queue_callback: Callable[[Callable[[], None]], None] | None = getattr(_engine, "queue_callback", None)
_dispatch_modes: Callable[[], int] | None = symbol("_C._len_torch_dispatch_stack")
_transforms: Callable[[], bool] | None = symbol("_C._are_functorch_transforms_active")
_forward_mode: Any = symbol("autograd.forward_ad")
_level_is_known = symbol("autograd.forward_ad._current_level") is not None


def is_tracing() -> bool:
    """Check whether torch.jit.trace records. Without the symbol: no."""
    return _tracing is not None and bool(_tracing())


def in_backward() -> bool | None:
    """Check whether this thread runs a backward pass. Without the symbols: None, which is not known."""
    if _graph_task is not None:
        return _graph_task() != -1
    return None if _autograd_node is None else _autograd_node() is not None


def sequence_number() -> int:
    """Return the number that autograd gives to this thread's next node. Without the symbol: 0."""
    return _sequence_number() if _sequence_number is not None else 0


def running_node_number() -> int:
    """Return the sequence number of the node whose backward runs. Without the symbols: 0."""
    number = getattr(_autograd_node() if _autograd_node is not None else None, "_sequence_nr", None)
    return 0 if number is None else int(number())


def in_checkpoint_function() -> bool:
    """Check whether the node whose backward runs is a reentrant checkpoint's. Without the symbol: no."""
    node = _autograd_node() if _autograd_node is not None else None
    return node is not None and node.name().startswith("CheckpointFunction")


def saving_hooks() -> Any:
    """Return the hooks that saved tensors pass through now, as in non-reentrant checkpointing; None without any.

    Without the symbol, something else each time: what a second run would need is kept always, longer than needed.
    """
    return object() if _saving_hooks is None else _saving_hooks(True)


def after_backward(do: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that this thread runs. Without the symbol: never."""
    if _queue_callback is not None:
        _queue_callback(do)


def operators_are_watched() -> bool:
    """Check for a TorchDispatchMode: a FLOP counter, a policy of selective checkpointing. Without the symbol: yes."""
    return _dispatch_modes is None or bool(_dispatch_modes())


def function_transforms_are_active() -> bool:
    """Check whether this runs inside vmap, grad or another transform of torch.func. Without the symbol: yes."""
    return _transforms is None or bool(_transforms())


def forward_mode_is_active() -> bool:
    """Check whether this runs inside forward-mode differentiation. Without the symbol: yes."""
    return not _level_is_known or bool(_forward_mode._current_level >= 0)
