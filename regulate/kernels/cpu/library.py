"""The compiled C++: a wheel's, else compiled here; loaded once, called with tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..addresses import has_address
from . import build, cache, shipped

_FUNCTIONS = (
    "regulate_step",
    "regulate_norm_relu",
    "regulate_norm_relu_backward",
    "regulate_instruction_set",
    "regulate_lanes",
)

_once = threading.Lock()
_found: ctypes.CDLL | str | None = None


def call(name: str, like: Tensor, *arguments: int | float | Tensor | None) -> None:
    """Call a function of the library: with the shape of its maps, the chunks and threads, and with these arguments.

    Args:
        name: of the function.
        like: one of the maps, (N, C, H, W).
        arguments: numbers, and tensors for their data; None is null.

    Raises:
        RuntimeError: there is no library; `why_not` says why.
        MemoryError: there is not enough memory for what it needs beside the tensors.
    """
    found = library()
    if isinstance(found, str):
        raise RuntimeError(f"the native kernels need a compiler, but {found}")
    sizes = (ctypes.c_int64 * 5)(*like.shape, channels_last(like))
    rest = (_passed(argument) for argument in (chunks(like), torch.get_num_threads(), *arguments))
    if getattr(found, name)(sizes, *rest):
        raise MemoryError(f"{name} found no memory for its buffers; use smaller images or fewer threads")


def _passed(argument: int | float | Tensor | None) -> object:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_void_p(None if argument is None else _address(argument))


def _address(tensor: Tensor) -> int:
    """Return where a tensor's numbers lie. The library sees addresses alone, no types."""
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not has_address(tensor):
        raise TypeError(
            "the native kernels read plain float32 tensors in memory of the CPU; got a "
            f"{type(tensor).__name__} of {tensor.dtype} on {tensor.device}: choose another form with kernels.use(...)"
        )
    return tensor.data_ptr()


def chunks(x: Tensor) -> int:
    """Into how many parts the batch of x is cut, so that many threads find work: some 64 tasks with the channels.

    It depends on the shape alone, so that results do not depend on the threads: a backward pass that runs a stage
    again (gradient checkpointing) may have another number of them, and must come to the same numbers.
    """
    blocks = -(-x.shape[1] // _lanes()) if channels_last(x) else x.shape[1]
    return max(1, min(x.shape[0], -(-64 // max(blocks, 1))))


def _lanes() -> int:
    """Return the floats of a vector, which is what channels last are cut into."""
    found = library()
    return 1 if isinstance(found, str) else int(found.regulate_lanes())


def channels_last(x: Tensor) -> bool:
    """Check whether the kernels read x (N, C, H, W) as channels last. What is both counts as contiguous."""
    return not x.is_contiguous()


def why_not() -> str | None:
    """Why the native kernel is off on this machine, or None if it is on. The first call may compile it."""
    found = library()
    return found if isinstance(found, str) else None


def instruction_set() -> str | None:
    """Return what the native kernels are compiled for, or None without them: `why_not` says why.

    One of `"AVX-512"` (vectors of 16 floats), `"AVX2"` (8), `"SSE2"`, `"NEON"` and `"generic"` (4).
    """
    found = library()
    if isinstance(found, str):
        return None
    found.regulate_instruction_set.restype = ctypes.c_char_p
    return str(found.regulate_instruction_set().decode())


def library() -> ctypes.CDLL | str:
    """Return the compiled library, or one line that says why there is none. The first call may compile it."""
    global _found
    if _found is None:
        with _once:  # threads that start together: one build, one warning
            if _found is None:
                _found = _find()
                if isinstance(_found, str):
                    warnings.warn(f"regulate computes without its CPU kernels: {_found}", stacklevel=2)
    return _found


def origin() -> str | None:
    """Return where the native kernels come from, or None without them."""
    found = library()
    if isinstance(found, str):
        return None
    return "from the wheel" if Path(found._name).parent == shipped.FOLDER else "compiled on this machine"


def _find() -> ctypes.CDLL | str:
    for path in shipped.libraries():
        with suppress(OSError):  # made for another system: one that is compiled here fits
            return _loaded(path)
    try:
        command = build.compiler()
        with cache.library_file(build.key(command), functools.partial(build.make_library, command)) as path:
            return _loaded(path)
    except (build.BuildError, OSError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _loaded(path: Path) -> ctypes.CDLL:
    # All symbols now: what is missing must be an error here, not a crash in the first step.
    found = ctypes.CDLL(str(path), mode=getattr(os, "RTLD_NOW", 0))
    missing = [name for name in _FUNCTIONS if not hasattr(found, name)]
    if missing:
        raise OSError(f"the compiled library has no {missing[0]}")
    return found
