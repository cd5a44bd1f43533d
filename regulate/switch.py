"""Switching the regulators off for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .guard import check_regulated, holders

# Of each thread: `off`, the ids of the holders that run without their regulators.
_thread = threading.local()
# The importing thread has it from the start: coming into being would be one more reason to compile anew.
_thread.off = frozenset()


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Runs a regulated network as the one without regulators: the same operations on its current weights.

    Nothing of the model is changed, so other threads and other models go on as they were; the calls made
    in the `with` block by this thread skip cells and fusions. Works inside and outside of compiled
    functions. After training, the outputs are those of the fine-tuned backbone alone.

    Args:
        model: a regulated model; a wrapper around one will do. `nn.DataParallel` on several GPUs runs its
            replicas in threads of its own, which do not see the switch: call its `module`.

    Yields:
        The model.

    Raises:
        NotRegulatedError: there are no regulators.

    Example:
        >>> import torch
        >>> from regulate import regulate
        >>> from torchvision.models import resnet18
        >>> model = resnet18().eval()
        >>> regulated, image = regulate(model, init="random"), torch.randn(1, 3, 64, 64)
        >>> with disabled(regulated):
        ...     torch.equal(regulated(image), model(image))
        True
    """
    check_regulated(model)
    before: frozenset[int] = getattr(_thread, "off", frozenset())
    _thread.off = before | {id(holder) for _, holder in holders(model)}
    try:
        yield model
    finally:
        _thread.off = before


def is_off(holder: nn.Module) -> bool:
    """Whether this thread runs a holder without its regulators."""
    # Plain attribute access and ids, because torch.compile follows and guards exactly these.
    return id(holder) in getattr(_thread, "off", ())
