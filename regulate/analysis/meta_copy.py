"""A model without its memory: a copy that can be traced, run for its shapes and cut up without consequence."""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._compat.compiler import COMPILED_CALL
from .._compat.modules import drop_hooks
from .._compat.operators import tree_leaves
from ..errors import UnsupportedModelError
from ..schema.text import first_line
from ..utils.modes import fixed_random_state

# Marks what had forward hooks.
_HOOKED = "_regulate_hooked"


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of the model on the meta device, in eval mode, without hooks; no memory for weights.

    Raises:
        UnsupportedModelError: the model cannot be copied, or holds a tensor that has no shape yet or none on the
            meta device.
    """
    memo: dict[int, Any] = {}
    _check_functions(model)
    for path, module in model.named_modules():
        for name, held in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            for tensor in _tensors(held):
                memo[id(tensor)] = _weightless(tensor, f"{path}.{name}".lstrip("."))
    advice = "make the model copyable, for instance by removing live handles from its attributes"
    copied = _copied(model, memo, "regulate works on a copy of the model", advice)
    _check_weightless(copied)
    for module in copied.modules():
        if drop_hooks(module):
            vars(module)[_HOOKED] = True
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False  # type: ignore[assignment]
    return copied.eval()


def duplicate(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise UnsupportedModelError(
                    f"regulate changes a copy, and torch does not copy the result of an operation, which "
                    f"{f'{path}.{name}'.lstrip('.')} is, as torch.nn.utils.prune and the old weight_norm leave it; "
                    "make that permanent (prune.remove, remove_weight_norm), delete it, or pass inplace=True"
                )
    # Outside of inference mode: a copy that can be trained wherever it was made.
    with torch.inference_mode(False):
        return _copied(model, {}, "regulate changes a copy", "pass inplace=True, or remove what cannot be copied")


def _copied(model: nn.Module, memo: dict[int, Any], rule: str, advice: str) -> nn.Module:
    try:
        with fixed_random_state():  # a copy may be built by a constructor, which draws weights
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{rule}, but copy.deepcopy({type(model).__name__}) failed: {first_line(error)}; {advice}"
        ) from error
    _check_separate(model, copied)
    return copied


def has_hooks(module: nn.Module) -> bool:
    """Check whether a module of a skeleton has forward hooks in the model, which may change what it puts out."""
    return _HOOKED in vars(module)


def _tensors(held: Any) -> list[Tensor]:
    """Return a tensor, or those in a container of a module's own; torch's hold tensors and modules."""
    if not isinstance(held, Tensor | list | tuple | dict):
        return []
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]


def _check_functions(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a function on a module that refers to the model: its copy runs the original."""
    held = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            kept = isinstance(value, FunctionType) and name != COMPILED_CALL
            cells = (value.__closure__ or ()) if kept else ()
            for inner in (cell.cell_contents for cell in cells if cell != CellType()):
                if id(getattr(inner, "__self__", inner)) in held:
                    raise UnsupportedModelError(
                        f"regulate works on a copy of the model, and {f'{path}.{name}'.lstrip('.')} is a function that "
                        "refers to the original and would run that; make it a method of the class, or a "
                        "types.MethodType of the module"
                    )


def _check_separate(model: nn.Module, copied: nn.Module) -> None:
    """Raise UnsupportedModelError where a copy shares modules with the model."""
    held = {id(module) for module in copied.modules()}
    for path, module in model.named_modules():
        if id(module) in held:
            raise UnsupportedModelError(
                f"regulate works on a copy of the model, and copy.deepcopy left {path or 'the model'} "
                f"({type(module).__name__}) as it is instead of copying it, as a __deepcopy__ of one's own may; let "
                "that return a copy"
            )


def _check_weightless(copied: nn.Module) -> None:
    """Raise UnsupportedModelError where a copy has other tensors than the weightless ones that it was to be made of."""
    for path, module in copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        held = (*module._parameters.values(), *module._buffers.values())
        if any(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in held):
            raise UnsupportedModelError(
                f"regulate works on a copy of the model, and copy.deepcopy built {path or 'the model'} "
                f"({type(module).__name__}) anew with other tensors, as a __deepcopy__ of one's own may; let that copy "
                "what there is"
            )


def _weightless(tensor: Tensor, name: str) -> Tensor:
    if is_lazy(tensor):
        raise UnsupportedModelError(
            f"regulate plans by shapes, and {name} has none yet, since it belongs to a lazy module; run the model once "
            "on a batch, then call regulate"
        )
    try:
        meta = tensor.detach().to("meta")
    except Exception as error:
        raise UnsupportedModelError(
            f"regulate plans on the meta device, and torch cannot put {name} there ({first_line(error)}); regulate the "
            "model before it is quantized or converted, or keep that tensor outside of the module"
        ) from error
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
