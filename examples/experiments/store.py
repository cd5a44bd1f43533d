"""Data sets as files of uint8: decoded once, checked against fixed digests, mapped into memory."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regulate.checkpoint.archive import replaced

from .sources import Arrays, DataError, read

# SHA-256 of the pixels, image by image and channel by channel, and of the labels, a byte each. CIFAR-100 has none:
# torchvision checks its files.
DIGESTS = {
    ("cifar10", "train"): (
        "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    ),
    ("cifar10", "test"): (
        "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ),
    ("fashion_mnist", "train"): (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    ),
    ("fashion_mnist", "test"): (
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    ),
}


def arrays(name: str, split: str, folder: Path, cache: Path | None = None) -> Arrays:
    """Return one split, from the store if it is there, else from its source, which is then stored.

    Args:
        name: "cifar10", "cifar100" or "fashion_mnist".
        split: "train" or "test".
        folder: of the source.
        cache: of the store; without it `folder`.

    Raises:
        MissingDataError: there is neither.
        DataError: pixels or labels are not those of the data set.
        OSError: the store could not be written.
    """
    place = cache or folder
    files = [place / f"{name}-{split}-{part}.npy" for part in ("pixels", "labels")]
    if all(file.exists() for file in files):
        pixels, labels = (_mapped(file) for file in files)
        _check(name, split, (pixels, labels), f"{files[0]} or {files[1]}")
        return pixels, labels
    found = read(name, split, folder)
    _check(name, split, found, str(folder))
    for file, array in zip(files, found, strict=True):
        _write(file, array)
    return found


def _mapped(file: Path) -> NDArray[np.uint8]:
    """Copy-on-write: processes share the pages, and torch takes the array for writable."""
    try:
        array: NDArray[np.uint8] = np.load(file, mmap_mode="c")
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no whole array ({error}); delete it, it is made anew") from error
    return array


def _write(file: Path, array: NDArray[np.uint8]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, array)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{file} cannot be written ({reason}); make room, or name another folder with --cache") from error


def _check(name: str, split: str, found: Arrays, where: str) -> None:
    kinds = [(array.ndim, str(array.dtype)) for array in found]
    if kinds != [(4, "uint8"), (1, "uint8")]:
        raise DataError(
            f"the {split} split of {name} in {where} should be pixels (N, C, H, W) and labels (N,) of uint8, and has "
            f"{kinds[0][0]} and {kinds[1][0]} dimensions of {kinds[0][1]} and {kinds[1][1]}; delete it and get it again"
        )
    expected = DIGESTS.get((name, split))
    if expected is None:
        return
    for part, array, digest in zip(("pixels", "labels"), found, expected, strict=True):
        seen = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        if seen != digest:
            raise DataError(
                f"the {split} {part} of {name} in {where} have SHA-256 {seen[:12]}..., not {digest[:12]}...; "
                "they are damaged or another data set: delete them and get them again"
            )
