"""Images in folders: read one by one, each with random numbers of its own."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from .messages import one_line
from .sources import DataError


def read(path: str) -> Image.Image:
    """Return an image in RGB.

    Raises:
        DataError: it cannot be read, for whatever reason; libraries raise more than one kind of exception there.
    """
    try:
        with Image.open(path) as image:
            if image.mode[:1] in "IF":  # Pillow would clip them to 8 bits: white or black throughout
                raise ValueError(f"its mode is {image.mode}, of more than 8 bits; scale it to 8")
            return image.convert("RGB")
    except Exception as error:
        raise DataError(
            f"{path} cannot be read ({one_line(error)}); replace it or take it out of the folder"
        ) from error


class Readable(ImageFolder):
    """An image folder whose damaged images are named. Folders such as .ipynb_checkpoints are no classes."""

    def __init__(self, root: str, transform: Any) -> None:
        super().__init__(root, transform, loader=read)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the classes' names and numbers."""
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith((".", "__MACOSX"))]
        return classes, {name: index for index, name in enumerate(classes)}


def digest(*splits: Readable) -> str:
    """Return a digest of paths, sizes and classes: whether two folders hold the same images, without reading them.

    Raises:
        DataError: a file is empty.
    """
    found = hashlib.sha256()
    for split in splits:
        for path, label in split.samples:
            size = Path(path).stat().st_size
            if not size:
                raise DataError(f"{path} is empty; replace it or take it out of the folder")
            found.update(f"{Path(path).relative_to(split.root)} {size} {label}\n".encode())
    return found.hexdigest()


class Drawn(Dataset[Any]):
    """A data set whose random transforms depend on seed, epoch and image alone, in whatever process they run.

    Transforms draw from the random states of Python and of torch, which are put back.

    Args:
        dataset: of (image, label).
        seed: of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        before = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(f"{self.seed} {self.epoch} {index}")
                torch.manual_seed(random.getrandbits(63))
                return self.dataset[index]
        finally:
            random.setstate(before)
