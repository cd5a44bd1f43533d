"""Switching the regulators off for a while."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from .._compat.compiler import COMPILER_READS_CONTEXT
from ..kernels.spans import repeated_node
from .carrier import Chain
from .lookup import chains, check_regulated

# The chains that run without their regulators in this context: thread, task or generator. Chains, and not uses:
# torch.compile guards what it finds here, and would compile anew for each use.
_off: ContextVar[tuple[Chain, ...]] = ContextVar("regulate_disabled", default=())
# Those of uses that began inside of a backward pass, as in a hook of the user's own.
_off_in_hook: ContextVar[tuple[Chain, ...]] = ContextVar("regulate_disabled_in_hook", default=())


class _Compiled(threading.local):
    """The same for compiled code: it cannot set a context variable, and before torch 2.14 it cannot read one.

    What it reads there instead is what this thread set last, in whichever of its tasks.
    """

    def __init__(self) -> None:
        self.off: tuple[Chain, ...] = ()


_compiled = _Compiled()


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run a regulated network as the one without regulators: the same operations on its current weights.

    Nothing of the model is changed, so other threads, other tasks and other models go on as they were; the
    calls made in the `with` block skip cells and fusions. Works inside and outside of compiled functions.
    Gradient checkpointing runs a block again as it ran first. After training, the outputs are those of the
    fine-tuned backbone alone.

    Args:
        model: a regulated model; a wrapper around one will do. `nn.DataParallel` on several GPUs runs its
            replicas in threads of its own, which do not see the switch: call its `module`.

    Yields:
        The model.

    Raises:
        NotRegulatedError: there are no regulators.

    Examples:
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
    found = chains(model)
    if torch.compiler.is_compiling():
        before = _compiled.off
        _compiled.off = (*before, *found)
        try:
            yield model
        finally:
            _compiled.off = before
        return
    switch = _off_in_hook if repeated_node() else _off
    _switch(switch, (*switch.get(), *found))
    own = object()
    begun = [chain.off.begin(own) for chain in found]
    try:
        yield model
    finally:
        for chain, number in zip(found, begun, strict=True):
            chain.off.end(own, number)
        # One entry less of each, not back to what was before: interleaved generators do not end in the order in which
        # they began.
        _switch(switch, tuple((Counter(switch.get()) - Counter(found)).elements()))


def _switch(switch: ContextVar[tuple[Chain, ...]], off: tuple[Chain, ...]) -> None:
    switch.set(off)
    if not COMPILER_READS_CONTEXT:
        _compiled.off = off


def is_off(chain: Chain) -> bool:
    """Check whether a chain runs without its regulators here and now."""
    if torch.compiler.is_compiling():
        return _holds(_compiled.off, chain) or (COMPILER_READS_CONTEXT and _holds(_off.get(), chain))
    if number := repeated_node():
        # A second run for gradient checkpointing: what counts is when the first one was.
        return _holds(_off_in_hook.get(), chain) or bool(chain.off.around(number))
    return _holds(_off.get(), chain)


def _holds(off: tuple[Chain, ...], chain: Chain) -> bool:
    return any(one is chain for one in off)
