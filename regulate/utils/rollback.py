"""All or nothing: a model is as it was before, where the body of a `with` block raises."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put keys, values, classes, hooks and attributes of a model back if the body raises.

    Containers that modules hold, such as those of hooks and parameters, stay the same objects, so that handles
    go on to work. Takes as much memory as the model's tensors do.

    Args:
        model: what the body changes in place.
    """
    modules = [(module, type(module), _contents(module)) for module in model.modules()]
    # A clone of an expanded view has the view's shape, and memory of its own.
    values = [(t, t.detach().clone(), t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        for module, original, contents in modules:
            # Not by the user's own __setattr__.
            object.__setattr__(module, "__class__", original)
            _restore(module, contents)
        for tensor, value, flag in values:
            _put_back(tensor, value, flag)
        raise


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and what it holds if it is a container."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | list | set) else None)
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, contents: dict[str, tuple[Any, Any]]) -> None:
    for value, held in contents.values():
        if held is not None:
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)
    vars(module).clear()
    vars(module).update({name: value for name, (value, _) in contents.items()})


def is_expanded(tensor: Tensor) -> bool:
    """Check whether several elements lie in one place, as `expand` makes them; such a tensor cannot be written."""
    return tensor.layout is torch.strided and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _equal(tensor: Tensor, value: Tensor) -> bool:
    return tensor.layout is torch.strided and torch.equal(tensor, value)


def _put_back(tensor: Tensor, value: Tensor, flag: bool) -> None:
    # What was not written may be memory that cannot be, such as a file that is mapped for reading.
    if not (tensor.is_meta or is_expanded(tensor) or _equal(tensor, value)):
        # A tensor that was made in inference mode can be written in no other.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
    if tensor.requires_grad != flag:
        tensor.requires_grad_(flag)
