"""Which form of a step to run: the setting, and what the tensors at hand allow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import gpu, library

CHOICES = ("auto", "native", "triton", "aten", "reference")

_setting = os.environ.get("REGULATE_KERNELS", "auto")
if _setting not in CHOICES:
    raise ValueError(f"REGULATE_KERNELS must be one of {', '.join(CHOICES)}; it is {_setting!r}")


def setting() -> str:
    """The form that is asked for, one of `CHOICES`."""
    return _setting


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Runs the body's steps in the given form, where the tensors allow it, and else in the readable one.

    Process-wide, like the environment variable REGULATE_KERNELS. A compiled model keeps the form that it
    was compiled with until it is compiled again.

    Args:
        choice: `"auto"`, `"native"`, `"triton"`, `"aten"` or `"reference"`.

    Raises:
        ValueError: no such form.

    Example:
        >>> import torch, regulate
        >>> cell = regulate.ConvLSTMCell(8)
        >>> fast, _ = cell(torch.ones(1, 8, 5, 5))
        >>> with regulate.kernels.use("reference"):
        ...     slow, _ = cell(torch.ones(1, 8, 5, 5))
        >>> torch.allclose(fast, slow, atol=1e-6)
        True
    """
    global _setting
    if choice not in CHOICES:
        raise ValueError(f"a kernel is one of {', '.join(CHOICES)}; got {choice!r}")
    before, _setting = _setting, choice
    try:
        yield
    finally:
        _setting = before


def choose(cell: str, x: Tensor, state: tuple[Tensor, ...] | None, weights: Sequence[Tensor], gates: int) -> str | None:
    """The form for a step of a light cell, or None for the readable one.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        x: input, (N, C, H, W).
        state: the state, or None.
        weights: mix, weight and bias of each gate convolution.
        gates: how many gates they hold in all.
    """
    tensors = (x, *(state or ()), *weights)
    if _setting == "reference" or not _plain(tensors):
        return None
    compiling = torch.compiler.is_compiling()
    # First what is being traced: its shapes are not to be looked at.
    if (_exporting() if compiling else _transformed()) or not _fitting(cell, x, state, weights, gates):
        return None
    device = x.device.type
    mixed = torch.is_autocast_enabled(device) if device in ("cpu", "cuda") else False
    same = all(t.dtype == x.dtype for t in tensors)
    wanted = CHOICES[1:] if _setting == "auto" else (_setting,)
    if "native" in wanted and device == "cpu" and same and not mixed and x.dtype == torch.float32 and _native():
        return "native"
    if "triton" in wanted and device == "cuda" and _triton(compiling):
        return "triton"
    if "aten" in wanted and same and not mixed and not compiling and device != "meta":
        return "aten"
    return None


def eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain float tensors on the CPU, to be computed with now, and fast forms are on."""
    return (
        _setting != "reference"
        and not torch.compiler.is_compiling()
        and _plain(tensors)
        and tensors[0].device.type == "cpu"
        and all(t.dtype == tensors[0].dtype for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not _transformed()
        and not dispatched()
    )


def native_here(*tensors: Tensor) -> bool:
    """Whether the native kernels may compute with these tensors now, outside compiling."""
    return _setting in ("auto", "native") and eager_on_cpu(*tensors) and tensors[0].dtype == torch.float32 and _native()


def _plain(tensors: Sequence[Tensor]) -> bool:
    """No subclass: quantized weights, fake and distributed tensors and tracers have ways of their own."""
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors) and all(
        t.is_floating_point() and t.device == tensors[0].device for t in tensors
    )


def _fitting(cell: str, x: Tensor, state: tuple[Tensor, ...] | None, weights: Sequence[Tensor], gates: int) -> bool:
    """The shapes that the kernels count on; anything else is for torch to broadcast or to refuse."""
    if x.dim() != 4 or (state is not None and len(state) != (2 if cell == "lstm" else 1)):
        return False
    rows = gates * x.shape[1]
    total = [sum(part.shape[0] for part in weights[kind::3]) for kind in range(3)]
    tails = [tuple(part.shape[1:]) for part in weights]
    return (
        total == [rows, rows, rows]
        and all(tail == ((2, 1, 1), (1, 3, 3), ())[i % 3] for i, tail in enumerate(tails))
        and all(part.shape == x.shape for part in state or ())
    )


def dispatched() -> bool:
    """Whether somebody looks at torch's operators as they run, a FLOP counter or a policy of checkpointing."""
    return bool(torch._C._len_torch_dispatch_stack())


def _exporting() -> bool:
    # What is exported must run without this package. Before torch 2.7 export looks like any compiling.
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def _transformed() -> bool:
    """Tracing by torch.jit, vmap and the other function transforms, and forward-mode differentiation."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _native() -> bool:
    return library.why_not() is None


def _triton(compiling: bool) -> bool:
    # While torch.compile traces is no time to try a kernel: then only what has been tried already counts.
    if compiling and gpu.works.cache_info().currsize == 0:
        return False
    return gpu.works("cuda")


# Not to be traced by torch.compile: they look around on this machine. The mark is all that
# torch.compiler.assume_constant_result does, but that imports the compiler, a second for everybody.
_native._dynamo_marked_constant = True  # type: ignore[attr-defined]
_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
