"""A warning for memory that does not learn."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..rewrite.guard import check_regulated, regulators


class GradientWatch:
    """Warns once if a cell has had no gradient in the first steps of training.

    A regulator whose memory is cut off trains as if it were not there, and nothing else shows it. With
    zero-initialised last norms the first gradient comes at the third step.

    Args:
        model: a regulated model. Gets a hook, which is gone after the last step or `remove()`.
        steps: forward passes in train mode to wait for.

    Examples:
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> watch = GradientWatch(regulate(resnet18()), steps=5)
    """

    def __init__(self, model: nn.Module, steps: int = 20) -> None:
        check_regulated(model)
        self.steps, self.seen, self.model = steps, 0, id(model)
        cells = {f"{path}.cell": part.cell for path, part in regulators(model) if hasattr(part, "cell")}
        self.silent = set(cells)
        self.hooks = ExitStack()
        self.hooks.enter_context(model.register_forward_pre_hook(self._count))
        for path, cell in cells.items():
            for parameter in cell.parameters():  # type: ignore[operator, union-attr]
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(partial(self._heard, path))
                    self.hooks.enter_context(hook)

    def remove(self) -> None:
        """Take the hooks away."""
        self.hooks.close()

    def _heard(self, path: str, parameter: Tensor) -> None:
        if path in self.silent and parameter.grad is not None and bool(parameter.grad.any()):
            self.silent.discard(path)

    def _count(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy of the model has this hook, too, and none on its parameters.
        if not (model.training and torch.is_grad_enabled() and id(model) == self.model):
            return
        if self.silent and self.seen < self.steps:
            self.seen += 1
            return
        self.remove()
        if self.silent:
            warnings.warn(
                f"no gradient has reached {', '.join(sorted(self.silent))} in {self.steps} steps; is the regulator "
                "frozen, switched off or detached?",
                stacklevel=2,
            )
