"""Images in folders: read one by one, each with random numbers of its own."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from .sources import DataError


def read(path: str) -> Any:
    """Return an image in RGB.

    Raises:
        DataError: it cannot be read, for whatever reason; libraries raise more than one kind of exception there.
    """
    try:
        return default_loader(path)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); replace it or take it out of the folder") from error


class Readable(ImageFolder):
    """An image folder whose damaged images are named."""

    def __init__(self, root: str, transform: Any) -> None:
        super().__init__(root, transform, loader=read)


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
