"""A model without its memory: a copy that can be traced, run for its shapes and cut up without consequence."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .errors import UnsupportedModelError, first_line

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, in eval mode, without hooks; no memory for weights.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _weightless(tensor)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"regulate works on a copy of the model, but copy.deepcopy({type(model).__name__}) failed: "
            f"{first_line(error)}; make the model copyable, for instance by removing live handles from its attributes"
        ) from error
    for module in copied.modules():
        for name in _HOOKS:
            getattr(module, name, {}).clear()
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False  # type: ignore[assignment]
    return copied.eval()


def _weightless(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
