"""The folder of compiled kernels: the user's alone, its files checked before use, each made once.

A library is code that runs in this process. So nothing is loaded that another user could have written, and nothing
that is damaged: a file's name holds the digest of its content.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there each process may build, and the last one's stays
    fcntl = None  # type: ignore[assignment]

_SCRATCH = "build-"


@contextmanager
def library_file(key: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """Hand out the path of a library for the time that loading it takes.

    It lies in `$XDG_CACHE_HOME/regulate` or `~/.cache/regulate`; where that cannot be used, which is a warning, in a
    temporary folder that is gone afterwards.

    Args:
        key: a name for the library.
        make: writes it to the path that it gets; called if there is no sound one. What it raises passes through.
    """
    with ExitStack() as stack:
        try:
            path = _from(_private_folder(), key, make)
        except (OSError, RuntimeError) as error:
            warnings.warn(
                f"regulate compiles its CPU kernels for this process alone, as their cache cannot be used: {error}; "
                "set XDG_CACHE_HOME to a folder of your own",
                stacklevel=2,
            )
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="regulate-"))) / "kernels.so"
            make(path)
        yield path


def _private_folder() -> Path:
    """Return the cache, made if need be. OSError or RuntimeError: it cannot be, or others could write to it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative one counts as none, says its standard: the working directory may hold anything.
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "regulate"
    if not folder.is_absolute():
        raise OSError(f"HOME is no absolute path, it is {os.environ.get('HOME')!r}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (_own(folder.lstat()) and _own(folder.stat())):
        raise OSError(f"{folder} belongs to another user")
    above = folder.parent.stat()
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise OSError(f"everybody may replace what lies in {folder.parent}")
    if above.st_uid != 0 and not _own(above):
        raise OSError(f"another user may replace what lies in {folder.parent}")
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def _own(info: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or info.st_uid == os.geteuid()


def _from(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    if found := _sound(folder, key):
        return found
    with _locked(folder) as alone:
        # Of processes that start together the first one builds, and the others find it here.
        return _sound(folder, key) or _made(folder, key, make, alone)


def _sound(folder: Path, key: str) -> Path | None:
    """Return the library of that key, if this user alone could write it and its content is what it was."""
    for path in folder.glob(f"kernels-{key}-*.so"):
        with suppress(FileNotFoundError):  # another process took it for damaged
            info = path.lstat()
            private = stat.S_ISREG(info.st_mode) and _own(info) and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if private and path.name == _name(key, path):
                return path
    return None


def _name(key: str, path: Path) -> str:
    return f"kernels-{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}.so"


def _made(folder: Path, key: str, make: Callable[[Path], None], alone: bool) -> Path:
    for path in folder.glob(f"{_SCRATCH}*") if alone else ():  # of a build that was killed: nobody else builds now
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"kernels-{key}-*.so"):
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        new = Path(scratch) / "kernels.so"
        make(new)
        new.chmod(0o700)
        return new.replace(folder / _name(key, new))


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Only one process at a time, where there are locks: whether this one is alone.

    The system ends the lock when its process ends, however it does.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    alone = False
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        yield alone
    finally:
        os.close(handle)
