"""The file: one safetensors archive with a record of what it is in its metadata. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..schema.text import first_line

FORMAT_VERSION = 1
_KEY = "regulate"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write an archive, wholly or not at all: whatever lay at `path` stays until the new file is on the disk.

    Args:
        path: the file; its folder must exist.
        tensors: contiguous CPU tensors that share no memory.
        record: JSON values.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: the file could not be written, or something else than a file lies at `path`.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **record})
    with replaced(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={"format": "pt", _KEY: text})
        except SafetensorError as error:
            raise CheckpointError(f"{path} could not be written: {first_line(error)}; is the disk full?") from error


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file that takes a path's place when the `with` block ends well, and vanishes if it does not."""
    target = Path(os.path.realpath(path))  # a link stays a link
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; create it first")
    if os.path.lexists(target) and not target.is_file():
        raise CheckpointError(
            f"a file is written over a regular file or where there is none, and {target} is "
            f"{'a folder' if target.is_dir() else 'no regular file'}; give the path of a file"
        )
    # Not the whole name, which may be as long as a name can be.
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        _flush(temporary)
        os.replace(temporary, target)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read an archive's record, None where another library wrote it, and its tensors, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no safetensors file, not a whole one, or of a newer format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            record = _record(path, file.metadata() or {})
            return record, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # whatever a parser makes of bytes that anybody may have written
        raise CheckpointError(
            f"{path} is not a whole checkpoint of regulate: {first_line(error)}; it is damaged or something else"
        ) from error


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Check whether `write` made a file; a damaged one counts if its header can be read."""
    # Whatever a parser makes of bytes that anyone may have written.
    with suppress(Exception), safe_open(path, framework="pt") as file:
        return _KEY in (file.metadata() or {})
    return False


def _record(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if _KEY not in metadata:
        return None
    record = json.loads(metadata[_KEY])
    version = record["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version!r}, and this version of regulate reads up to {FORMAT_VERSION}; "
            "pip install --upgrade torch-regulate"
        )
    return dict(record)
