"""Compiles the C++ beside this file, for this processor or for the instruction sets of a wheel.

setup.py loads this file by itself: it imports nothing of this package and no torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_THIS_PROCESSOR = ("-march=native",)
_SECONDS = 300  # that one call of the compiler may take

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """An instruction set that wheels hold a library for.

    Args:
        name: as compilers have it.
        needs: features of the processor, as Linux names them.
    """

    name: str
    needs: str = ""

    @property
    def file(self) -> str:
        """Name of the library."""
        return f"{self.name}.so"


_V3 = "avx2 fma bmi1 bmi2 f16c abm movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
_ARM = (Target("armv8-a"),)
# By machine, the fastest first. The last one runs on every processor of its kind.
TARGETS = {
    "x86_64": (Target("x86-64-v4", _V4), Target("x86-64-v3", _V3), Target("x86-64")),
    "aarch64": _ARM,
    "arm64": _ARM,
}


class BuildError(Exception):
    """The kernels cannot be compiled; one line says why."""


def compiler() -> list[str]:
    """Return the command of the C++ compiler: `$CXX`, g++ or clang++.

    Raises:
        BuildError: there is none, or `$CXX` is no command.
    """
    named = os.environ.get("CXX", "").strip()
    found = named or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise BuildError("no C++ compiler was found; install g++ or set CXX")
    try:
        return shlex.split(named) if named else [found]
    except ValueError as error:
        raise BuildError(f"CXX is no command: {error}; it is {named!r}") from error


def key(command: Sequence[str]) -> str:
    """Return a name for what `make_library` makes, from all that it depends on.

    The processor counts, too: where machines share a home, none must get another one's library.
    """
    sources = [path.read_text() for path in [*sorted(_HERE.glob("*.h")), *_units()]]
    parts = [*command, *_FLAGS, *_THIS_PROCESSOR, *sources, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def make_library(command: Sequence[str], out: Path, target: Sequence[str] = _THIS_PROCESSOR) -> None:
    """Compile the kernels, with OpenMP where the compiler has it.

    They are not linked to it: torch's own is loaded already, and one pool of threads is enough.

    Args:
        command: of a C++ compiler.
        out: the library, in a folder of its own, where all that is written on the way lies as well.
        target: flags that say which processor it is for.

    Raises:
        BuildError: the compiler does not run, fails, or makes no file.
    """
    if target == _THIS_PROCESSOR:
        _log.warning("regulate compiles its CPU kernels with %s: some seconds, once for this processor", command[0])
    objects = [str(out.with_name(f"{unit.stem}.o")) for unit in _units()]
    for unit, made in zip(_units(), objects, strict=True):
        compiling = [*command, *_FLAGS, *target, "-c", str(unit), "-o", made]
        try:
            _run([*compiling, "-fopenmp"], out.parent)
        except BuildError:
            _run(compiling, out.parent)
    _run([*command, "-shared", *objects, "-o", str(out)], out.parent)
    if not out.is_file():
        raise BuildError(f"{command[0]} ended without an error and without a library")


def make_for_wheel(folder: Path, machine: str) -> list[Path]:
    """Compile a library for each instruction set of a kind of machine. Returns them; none without a compiler.

    Args:
        folder: of the libraries, made if need be.
        machine: as `platform.machine()` names it.
    """
    made = []
    for target in TARGETS.get(machine.lower(), ()):
        with tempfile.TemporaryDirectory() as scratch:
            new = Path(scratch) / target.file
            try:
                make_library(compiler(), new, (f"-march={target.name}",))
            except BuildError as error:
                _log.warning("this wheel goes without the kernels for %s: %s", target.name, error)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            made.append(Path(shutil.move(new, folder / target.file)))
    return made


def _run(command: list[str], folder: Path) -> None:
    """Run a compiler whose temporary files lie in a folder; a BuildError has a line of its complaint."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} made no library: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        telling = [line for line in said if "error" in line.lower()] or said
        raise BuildError(f"{command[0]} made no library: {telling[-1]}")


def _units() -> list[Path]:
    return sorted(_HERE.glob("*.cpp"))


def told_of_processor(*names: str) -> list[str]:
    """Return what Linux says of the processor under these names, each once, in order; nothing where it does not say."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return []
    return sorted({value.strip() for name, _, value in lines if name.strip().lower() in names})


def _processor() -> str:
    """Return what tells one kind of processor from another: its name and its instruction sets."""
    told = told_of_processor("flags", "features", "model name")
    return "\n".join([platform.machine(), platform.processor(), *told])
