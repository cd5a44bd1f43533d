"""Switching the regulators off for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from .._compat import COMPILER_READS_CONTEXT, in_backward, running_node_number, sequence_number
from .carrier import Chain
from .record import chains, check_regulated

# The chains that run without their regulators in this context: thread, task or generator.
_off: ContextVar[tuple[Chain, ...]] = ContextVar("regulate_disabled", default=())
# Chains are shared by threads, and so are their spans.
_lock = threading.Lock()
# How many uses of `disabled` a backward pass can look back on.
_SPANS = 64
_OPEN = 2**63


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
    found = chains(model)
    if torch.compiler.is_compiling():
        before = _compiled.off
        _compiled.off = (*before, *found)
        try:
            yield model
        finally:
            _compiled.off = before
        return
    _switch((*_off.get(), *found))
    begun = sequence_number()
    _open_span(found, begun)
    try:
        yield model
    finally:
        _close_span(found, begun)
        # Not back to what was before: interleaved generators do not end in the order in which they began.
        _switch(_without(_off.get(), found))


def _switch(off: tuple[Chain, ...]) -> None:
    _off.set(off)
    if not COMPILER_READS_CONTEXT:
        _compiled.off = off


def is_off(chain: Chain) -> bool:
    """Check whether a chain runs without its regulators here and now."""
    if torch.compiler.is_compiling():
        return _holds(_compiled.off, chain) or (COMPILER_READS_CONTEXT and _holds(_off.get(), chain))
    if in_backward() and running_node_number():
        # A second run for gradient checkpointing: what counts is when the first one was.
        number, thread = running_node_number(), _thread()
        return any(begun <= number < ended and thread in (of, None) for of, begun, ended in chain.off_spans)
    return _holds(_off.get(), chain)


def _holds(off: tuple[Chain, ...], chain: Chain) -> bool:
    return any(one is chain for one in off)


def _without(off: tuple[Chain, ...], found: tuple[Chain, ...]) -> tuple[Chain, ...]:
    """The chains without one entry of each of those found."""
    left = list(off)
    for chain in found:
        at = next((i for i, one in enumerate(left) if one is chain), None)
        if at is not None:
            del left[at]
    return tuple(left)


def _thread() -> int | None:
    """This thread, whose numbers of autograd are its own; None for one of autograd's, which serve others."""
    thread = threading.current_thread()
    return None if isinstance(thread, threading._DummyThread) else thread.ident


def _open_span(found: tuple[Chain, ...], begun: int) -> None:
    with _lock:
        for chain in found:
            chain.off_spans = (*chain.off_spans, (_thread(), begun, _OPEN))[-_SPANS:]


def _close_span(found: tuple[Chain, ...], begun: int) -> None:
    ended = sequence_number()
    with _lock:
        for chain in found:
            others = tuple(span for span in chain.off_spans if span != (_thread(), begun, _OPEN))
            # Where no node was made, as without gradients, there is nothing to look back on.
            chain.off_spans = (*others, (_thread(), begun, ended)) if ended > begun else others
