"""Compiles the C++ beside this file and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_THIS_PROCESSOR = ("-march=native",)


def call(name: str, *arguments: int | float | list[int] | Tensor | None) -> None:
    """Calls a function of the library with numbers, arrays of integers, and the data of tensors; None is null.

    Raises:
        RuntimeError: there is no library; `why_not` says why.
    """
    found = library()
    if isinstance(found, str):
        raise RuntimeError(f"the native kernels need a compiler, but {found}")
    getattr(found, name)(*(_passed(argument) for argument in arguments))


def _passed(argument: int | float | list[int] | Tensor | None) -> object:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, list):
        return (ctypes.c_int64 * len(argument))(*argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def chunks(x: Tensor) -> int:
    """Into how many parts the batch of x is cut, so that many threads find work: some 64 tasks with the channels.

    It depends on the shape alone, so that results do not depend on the threads: a backward pass that runs a stage
    again (gradient checkpointing) may have another number of them, and must come to the same numbers.
    """
    blocks = -(-x.shape[1] // _lanes()) if channels_last(x) else x.shape[1]
    return max(1, min(x.shape[0], -(-64 // max(blocks, 1))))


def _lanes() -> int:
    """The floats of a vector, which is what channels last are cut into."""
    found = library()
    return 1 if isinstance(found, str) else int(found.regulate_lanes())


def channels_last(x: Tensor) -> bool:
    """Whether the kernels read x (N, C, H, W) as channels last. What is both counts as contiguous."""
    return not x.is_contiguous()


def why_not() -> str | None:
    """Why the native kernel is off on this machine, or None if it is on. Compiles it on the first call."""
    found = library()
    return found if isinstance(found, str) else None


def instruction_set() -> str | None:
    """Return what the native kernels are compiled for, or None without them: `why_not` says why.

    One of `"AVX-512"` (vectors of 16 floats), `"AVX2"` (8), `"SSE2"`, `"NEON"` and `"generic"` (4).
    """
    found = library()
    return None if isinstance(found, str) else str(_name(found).decode())


def _name(library: ctypes.CDLL) -> bytes:
    library.regulate_instruction_set.restype = ctypes.c_char_p
    name: bytes = library.regulate_instruction_set()
    return name


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled library, or one line that says why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler was found; install g++ or set CXX"
    try:
        # All symbols now: what is missing must be an error here, not a crash in the first step.
        return ctypes.CDLL(str(_compiled(shlex.split(compiler))), mode=getattr(os, "RTLD_NOW", 0))
    except (OSError, subprocess.SubprocessError) as error:
        text = str(getattr(error, "stderr", None) or error).strip()
        reason = f"{compiler} made no library that loads: {text.splitlines()[-1]}"
        warnings.warn(f"regulate computes without its CPU kernel: {reason}", stacklevel=2)
        return reason


def _compiled(compiler: list[str]) -> Path:
    # A binary for this very processor: where machines share a home, none must get another one's.
    sources = [path.read_text() for path in sorted(_HERE.glob("*.h")) + _units()]
    key = "\0".join([*compiler, *_FLAGS, *_THIS_PROCESSOR, *sources, _processor()])
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _cache()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make_library(compiler, Path(scratch) / name)
            (Path(scratch) / name).replace(folder / name)  # in one piece: other processes may do the same
    return folder / name


def _units() -> list[Path]:
    return sorted(_HERE.glob("*.cpp"))


def make_library(compiler: Sequence[str], out: Path, target: Sequence[str] = _THIS_PROCESSOR) -> None:
    """Compile the kernels, with OpenMP where the compiler has it.

    It is not linked to it: torch's own is loaded already, and one pool of threads is enough.

    Args:
        compiler: command of a C++ compiler.
        out: the library; what is compiled on the way lies beside it.
        target: flags that say which processor it is for.
    """
    objects = [str(out.with_name(f"{unit.stem}.o")) for unit in _units()]
    for unit, made in zip(_units(), objects, strict=True):
        compiling = [*compiler, *_FLAGS, *target, "-c", str(unit), "-o", made]
        if subprocess.run([*compiling, "-fopenmp"], capture_output=True, timeout=300).returncode:
            subprocess.run(compiling, check=True, capture_output=True, text=True, timeout=300)
    subprocess.run([*compiler, "-shared", *objects, "-o", str(out)], check=True, capture_output=True, text=True)


def _processor() -> str:
    """What tells one kind of processor from another: its name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    telling = ("flags", "features", "model name")
    told = {line for line in lines if line.partition(":")[0].strip().lower() in telling}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


def _cache() -> Path:
    """The folder of compiled kernels: $XDG_CACHE_HOME/regulate, or a private one where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regulate"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="regulate-"))
