"""A model without its memory: a copy that can be traced, run for its shapes and cut up without consequence."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._compat import drop_hooks
from .errors import UnsupportedModelError, first_line

# Marks what had forward hooks.
_HOOKED = "_regulate_hooked"


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, in eval mode, without hooks; no memory for weights.

    Raises:
        UnsupportedModelError: the model cannot be copied, or holds a tensor that has no shape yet or none on the
            meta device.
    """
    memo: dict[int, Any] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _weightless(tensor, f"{path}.{name}".lstrip("."))
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"regulate works on a copy of the model, but copy.deepcopy({type(model).__name__}) failed: "
            f"{first_line(error)}; make the model copyable, for instance by removing live handles from its attributes"
        ) from error
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
    try:
        with torch.inference_mode(False):  # a copy that can be trained wherever it was made
            return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"regulate changes a copy, but copy.deepcopy({type(model).__name__}) failed: {first_line(error)}; pass "
            "inplace=True, or remove what cannot be copied"
        ) from error


def has_hooks(module: nn.Module) -> bool:
    """Check whether a module of a skeleton has forward hooks in the model, which may change what it puts out."""
    return _HOOKED in vars(module)


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
