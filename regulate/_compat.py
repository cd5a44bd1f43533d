"""Every private symbol of torch and timm that is used here, with what happens where it is missing.

Only the dictionaries of an `nn.Module` (`_modules`, `_parameters`, `_buffers`), which are in every pickled module, a
state dict's `_metadata` and a tensor's `_version` are used elsewhere, too.
tests/compatibility/test_compat.py takes each of the others away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.torch_version import TorchVersion

# Whether torch.compile reads context variables, and compiles anew where they have changed.
COMPILER_READS_CONTEXT: bool = TorchVersion(torch.__version__) >= "2.14"
_EXPORT_IS_FLAGGED = hasattr(torch.compiler, "_is_exporting_flag")


def _symbol(path: str) -> Any:
    """Look a symbol of torch up; None where this version has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_tracing: Callable[[], bool] | None = _symbol("jit.is_tracing")
_graph_task: Callable[[], int] | None = _symbol("_C._current_graph_task_id")
_autograd_node: Callable[[], Any] | None = _symbol("_C._current_autograd_node")
_sequence_number: Callable[[], int] | None = _symbol("autograd._get_sequence_nr")
_saving_hooks: Callable[[bool], Any] | None = _symbol("_C._autograd._top_saved_tensors_default_hooks")

_engine: Any = _symbol("autograd.Variable._execution_engine")
_queue_callback: Callable[[Callable[[], None]], None] | None = getattr(_engine, "queue_callback", None)
_dispatch_modes: Callable[[], int] | None = _symbol("_C._len_torch_dispatch_stack")
_transforms: Callable[[], bool] | None = _symbol("_C._are_functorch_transforms_active")
_forward_mode: Any = _symbol("autograd.forward_ad")
_level_is_known = _symbol("autograd.forward_ad._current_level") is not None

_ALLOWING = "_disable_side_effect_safety_checks_for_current_subtracer"
_COMPILED = "_orig_mod"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_ON_OUTPUT = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
# Where `nn.Module.compile` keeps the compiled call; torch's copies leave it out.
COMPILED_CALL = "_compiled_call_impl"
_HOOKS_EVERYWHERE = tuple(f"_global{name}" for name in _HOOKS)
_modules: Any = _symbol("nn.modules.module")
# How torch.fx begins the names of constants that it puts on the module that it traces.
FX_CONSTANT = "_tensor_constant"

Function = TypeVar("Function", bound=Callable[..., Any])

with suppress(ImportError):
    import_module("torch.utils.flop_counter")
_flops: dict[Any, Callable[..., int]] = _symbol("utils.flop_counter.flop_registry") or {}
_register_flops: Callable[[Any], Callable[[Any], Any]] | None = _symbol("utils.flop_counter.register_flop_formula")
_tree_leaves: Callable[[Any], list[Any]] | None = _symbol("utils._pytree.tree_leaves")
_tree_map: Callable[[Callable[[Any], Any], Any], Any] | None = _symbol("utils._pytree.tree_map")


class _Blind(nullcontext[None]):
    """In the place of a TorchDispatchMode: sees no operator."""


# Base classes. Without them: torch's own classes that have them, and what is derived from these.
if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode

    BatchNorm = nn.modules.batchnorm._BatchNorm
    NormWithStatistics = nn.modules.batchnorm._NormBase
    Convolution = nn.modules.conv._ConvNd
    DispatchMode = TorchDispatchMode
else:
    BatchNorm = _symbol("nn.modules.batchnorm._BatchNorm") or (
        nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    )
    NormWithStatistics = _symbol("nn.modules.batchnorm._NormBase") or (
        BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
    )
    Convolution = _symbol("nn.modules.conv._ConvNd") or (
        nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    )
    DispatchMode = _symbol("utils._python_dispatch.TorchDispatchMode") or _Blind
# Whether a DispatchMode sees the operators that run. If not, no trace is believed more than its points need.
SEES_OPERATORS: bool = not issubclass(DispatchMode, _Blind)


class NoParameter:
    """A mixin for symbols: `isinstance(symbol, nn.Parameter)` asks for these, and would record the question."""

    _is_param = _is_buffer = False


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


def assign(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, also from compiled and checkpointed code, of an object that lives outside of it.

    Without the symbol, torch.compile breaks its graph at a checkpointed block.
    """
    if torch.compiler.is_compiling():
        # Imported here: torch's compiler takes more than a second to import.
        from torch._dynamo import utils

        allowed = getattr(utils, _ALLOWING, None)
        if allowed is not None:
            allowed(setattr, owner, name, value)
            return
    setattr(owner, name, value)


def is_exporting() -> bool:
    """Check whether torch.export traces. Without the symbol, yes as well where torch.compile does, in some versions.

    Not by `torch.compiler.is_exporting()`: the compiler takes that for true, at least up to torch 2.9.
    """
    return bool(torch.compiler._is_exporting_flag) if _EXPORT_IS_FLAGGED else torch.compiler.is_exporting()


def operators_are_watched() -> bool:
    """Check for a TorchDispatchMode: a FLOP counter, a policy of selective checkpointing. Without the symbol: yes."""
    return _dispatch_modes is None or bool(_dispatch_modes())


def function_transforms_are_active() -> bool:
    """Check whether this runs inside vmap, grad or another transform of torch.func. Without the symbol: yes."""
    return _transforms is None or bool(_transforms())


def forward_mode_is_active() -> bool:
    """Check whether this runs inside forward-mode differentiation. Without the symbol: yes."""
    return not _level_is_known or bool(_forward_mode._current_level >= 0)


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


def constant_while_compiling(function: Function) -> Function:
    """Mark a function that torch.compile calls while it traces, instead of tracing it.

    The mark is all that `torch.compiler.assume_constant_result` sets, but that imports the compiler, which takes a
    second. A compiler that does not know the mark traces the function, or breaks the graph there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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


def compiled(model: nn.Module) -> nn.Module | None:
    """Return the model inside torch.compile's wrapper, which has no public class; None for any other module."""
    # Not .get(): a ScriptModule has children of another kind.
    return model.get_submodule(_COMPILED) if _COMPILED in model._modules else None


def timm_config_writer() -> Callable[..., Any] | None:
    """Return timm's function that writes down how it built a model. Without the symbol: None."""
    with suppress(ImportError):
        return getattr(import_module("timm.models._hub"), "save_config_for_hf", None)
    return None
