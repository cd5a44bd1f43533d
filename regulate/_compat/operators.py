"""Operators as they run: who sees them, what they count and write; and the leaves of nested containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .lookup import symbol

Function = TypeVar("Function", bound=Callable[..., Any])

with suppress(ImportError):
    import_module("torch.utils.flop_counter")
_flops: dict[Any, Callable[..., int]] = symbol("utils.flop_counter.flop_registry") or {}
_register_flops: Callable[[Any], Callable[[Any], Any]] | None = symbol("utils.flop_counter.register_flop_formula")
_tree_leaves: Callable[[Any], list[Any]] | None = symbol("utils._pytree.tree_leaves")
_tree_map: Callable[[Callable[[Any], Any], Any], Any] | None = symbol("utils._pytree.tree_map")


class _Blind(nullcontext[None]):
    """In the place of a TorchDispatchMode: sees no operator."""


if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode

    DispatchMode = TorchDispatchMode
else:
    DispatchMode = symbol("utils._python_dispatch.TorchDispatchMode") or _Blind

# Whether a DispatchMode sees the operators that run. If not, no trace is believed more than its points need.
SEES_OPERATORS: bool = not issubclass(DispatchMode, _Blind)


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested containers. Without the symbol: of tuples, lists and mappings only."""
    return _tree_leaves(tree) if _tree_leaves is not None else list(_leaves(tree))


# No union: before torch 2.9 its compiler knows none.
_CONTAINERS = (tuple, list, dict)


def _leaves(tree: Any) -> Iterator[Any]:
    if not isinstance(tree, _CONTAINERS):
        yield tree
        return
    for part in tree.values() if isinstance(tree, dict) else tree:
        yield from _leaves(part)


def tree_map(do: Callable[[Any], Any], tree: Any) -> Any:
    """Return nested containers with another leaf for each, in order. Without the symbol: tuples, lists, mappings."""
    return _tree_map(do, tree) if _tree_map is not None else _mapped(do, tree)


def _mapped(do: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return type(tree)((name, _mapped(do, part)) for name, part in tree.items())
    if not isinstance(tree, tuple | list):
        return do(tree)
    parts = [_mapped(do, part) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def flops(operator: Any, args: Any, kwargs: Any, result: Any) -> int | None:
    """Count the operations of one call of torch's operator. Without the symbols: None, which is not known."""
    packet = getattr(operator, "_overloadpacket", None)
    # A registry that does not know convolutions by this name would count nothing and say 0.
    if packet is None or torch.ops.aten.convolution not in _flops:
        return None
    count = _flops.get(packet)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


def flop_formula(operator: Any) -> Callable[[Function], Function]:
    """Decorate the function that counts an operator's operations. Without the symbol: nobody asks it."""
    return (lambda function: function) if _register_flops is None else _register_flops(operator)


def is_pure(operator: Any) -> bool:
    """Check whether one of torch's operators draws no random numbers and writes to nothing. Without the symbol: no."""
    schema = getattr(operator, "_schema", None)
    return schema is not None and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in operator.tags


def written(operator: Any, args: Any) -> list[torch.Tensor]:
    """Return the tensors among positional arguments that one call of torch's operator writes to.

    Without the symbol: none, and a change is seen by the version of the tensor that was changed alone.
    """
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = zip(schema.arguments, args, strict=False)
    held = [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return what a tensor lies on; None for one without storage, as a sparse one or one under torch.func."""
    with suppress(RuntimeError, NotImplementedError):
        return tensor.untyped_storage()
    return None
