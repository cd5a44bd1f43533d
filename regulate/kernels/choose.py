"""Which form of a step to run: the setting, and what the tensors at hand allow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .._compat import autograd, compiler
from .addresses import PLAIN, has_address
from .cpu import library
from .cuda import gpu
from .spans import Spans, repeated_node

CHOICES = ("auto", "native", "triton", "aten", "reference")

_DEFAULT = os.environ.get("REGULATE_KERNELS", "auto")


class _Use:
    """One `with use(...)`, told from another one with the same choice."""

    def __init__(self, choice: str) -> None:
        self.choice, self.in_backward = choice, bool(repeated_node())


# All that have begun and not ended here, the latest last. Of generators that take turns the first may end first: each
# takes out its own.
_uses: ContextVar[tuple[_Use, ...]] = ContextVar("regulate.kernels.use", default=())

# The same, and those that have ended, for what a backward pass runs again.
_spans = Spans()

# The latest in code that torch.compile is tracing, which cannot set a context variable.
_traced: str | None = None


def setting() -> str:
    """Return the form that is asked for here, one of `CHOICES`."""
    if torch.compiler.is_compiling():
        return _asked() if _traced is None else _traced
    return _asked_at_first(number) if (number := repeated_node()) else _asked()


def _default() -> str:
    if _DEFAULT not in CHOICES:  # not at import, where no command could say it in a line
        raise ValueError(f"REGULATE_KERNELS must be one of {', '.join(CHOICES)}; it is {_DEFAULT!r}")
    return _DEFAULT


def _asked() -> str:
    uses = _uses.get()
    return uses[-1].choice if uses else _default()


def _asked_at_first(number: int) -> str:
    """Return what was asked for when a node was made whose backward runs a block again, or here by a user's hook."""
    uses = [use for use in _uses.get() if use.in_backward] or _spans.around(number)
    return uses[-1].choice if uses else _default()


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Run the body's steps in the given form, where the tensors allow it, and else in the readable one.

    In this thread, or this task of an event loop, and not in others; the environment variable REGULATE_KERNELS is
    for all of the process. Gradient checkpointing runs a block again in the form in which it ran first, wherever the
    backward pass is. With torch before 2.14 a compiled model keeps the form that it was compiled with.

    Args:
        choice: `"auto"`, `"native"`, `"triton"`, `"aten"` or `"reference"`.

    Raises:
        ValueError: no such form.

    Examples:
        >>> import torch, regulate
        >>> cell = regulate.ConvLSTMCell(8)
        >>> fast, _ = cell(torch.ones(1, 8, 5, 5))
        >>> with regulate.kernels.use("reference"):
        ...     slow, _ = cell(torch.ones(1, 8, 5, 5))
        >>> torch.allclose(fast, slow, atol=1e-6)
        True
    """
    global _traced
    if choice not in CHOICES:
        raise ValueError(f"a kernel is one of {', '.join(CHOICES)}; got {choice!r}")
    if torch.compiler.is_compiling():
        before, _traced = _traced, choice
        try:
            yield
        finally:
            _traced = before
        return
    own = _Use(choice)
    _uses.set((*_uses.get(), own))
    begun = _spans.begin(own)
    try:
        yield
    finally:
        _spans.end(own, begun)
        _uses.set(tuple(one for one in _uses.get() if one is not own))


def choose(cell: str, x: Tensor, state: tuple[Tensor, ...] | None, weights: Sequence[Tensor], gates: int) -> str | None:
    """Return the form for a step of a light cell, or None for the readable one.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        x: input, (N, C, H, W).
        state: the state, or None.
        weights: mix, weight and bias of each gate convolution.
        gates: how many gates they hold in all.
    """
    tensors = (x, *(state or ()), *weights)
    asked = setting()
    if asked == "reference" or not _plain(tensors):
        return None
    compiling = torch.compiler.is_compiling()
    # First what is being traced: its shapes are not to be looked at. What is exported must run without this package.
    unknown = compiler.is_exporting() if compiling else _transformed() or not has_address(*tensors)
    if unknown or not _fitting(cell, x, state, weights, gates):
        return None
    device = x.device.type
    mixed = torch.is_autocast_enabled(device) if device in ("cpu", "cuda") else False
    same = all(t.dtype == x.dtype for t in tensors)
    wanted = CHOICES[1:] if asked == "auto" else (asked,)
    if "native" in wanted and device == "cpu" and same and not mixed and x.dtype == torch.float32 and _native():
        return "native"
    if "triton" in wanted and device == "cuda" and _triton(compiling):
        return "triton"
    if "aten" in wanted and same and not mixed and not compiling and device != "meta":
        return "aten"
    return None


def eager_on_cpu(*tensors: Tensor) -> bool:
    """Check whether these are plain float tensors on the CPU, to be computed with now, and fast forms are on."""
    return (
        not torch.compiler.is_compiling()
        and setting() != "reference"
        and _plain(tensors)
        and tensors[0].device.type == "cpu"
        and all(t.dtype == tensors[0].dtype for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not _transformed()
        and not autograd.operators_are_watched()
        and has_address(*tensors)
    )


def native_here(*tensors: Tensor) -> bool:
    """Check whether the native kernels may compute with these tensors now, outside compiling."""
    return (
        eager_on_cpu(*tensors) and setting() in ("auto", "native") and tensors[0].dtype == torch.float32 and _native()
    )


def _plain(tensors: Sequence[Tensor]) -> bool:
    """No subclass: quantized weights, fake and distributed tensors and tracers have ways of their own."""
    return all(type(t) in PLAIN and t.is_floating_point() and t.device == tensors[0].device for t in tensors)


def _fitting(cell: str, x: Tensor, state: tuple[Tensor, ...] | None, weights: Sequence[Tensor], gates: int) -> bool:
    """Return the shapes that the kernels count on; anything else is for torch to broadcast or to refuse."""
    if x.dim() != 4 or 0 in x.shape[2:] or (state is not None and len(state) != (2 if cell == "lstm" else 1)):
        return False
    rows, kinds = gates * x.shape[1], enumerate(((2, 1, 1), (1, 3, 3), ()))
    return all(part.shape == x.shape for part in state or ()) and all(
        sum(len(part) for part in weights[kind::3]) == rows and all(part.shape[1:] == tail for part in weights[kind::3])
        for kind, tail in kinds
    )


def _transformed() -> bool:
    """Tracing by torch.jit, vmap and the other function transforms, and forward-mode differentiation."""
    return autograd.is_tracing() or autograd.function_transforms_are_active() or autograd.forward_mode_is_active()


# These two look around on this machine.
@compiler.constant_while_compiling
def _native() -> bool:
    return library.why_not() is None


@compiler.constant_while_compiling
def _triton(compiling: bool) -> bool:
    # While torch.compile traces is no time to try a kernel: then only what has been tried already counts.
    if compiling and gpu.works.cache_info().currsize == 0:
        return False
    return gpu.works("cuda")


if not compiler.COMPILER_READS_CONTEXT:
    compiler.constant_while_compiling(_asked)
