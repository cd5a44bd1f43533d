"""The data sets of the experiments: scikit-learn's digits, CIFAR-10 and -100, image folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

NAMES = ("digits", "cifar10", "cifar100", "imagefolder")
_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class MissingDataError(FileNotFoundError):
    """The data are not where they were looked for; the message says how to get them."""


@dataclass(frozen=True)
class Data:
    """Two data sets of (image, label) and what a network has to know of them.

    Args:
        train: (C, H, W) images, augmented.
        test: the same, not augmented.
        classes: how many there are.
        channels: C.
        size: H = W in pixels.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    channels: int
    size: int


def load(name: str, root: str | None = None, subset: int | None = None, seed: int = 0, size: int = 224) -> Data:
    """Loads a data set.

    Args:
        name: one of `NAMES`.
        root: folder of the data; digits need none.
        subset: how many training images to keep, the same number of each class as far as it goes.
        seed: chooses the subset.
        size: of the images of an image folder, in pixels.

    Raises:
        MissingDataError: there is nothing in `root`.
        ValueError: the subset is larger than the data.
    """
    data = _digits() if name == "digits" else _folder(root, size) if name == "imagefolder" else _cifar(name, root)
    if subset is None:
        return data
    train = Subset(data.train, _balanced(_labels(data.train), subset, seed))
    return Data(train, data.test, data.classes, data.channels, data.size)


def _digits() -> Data:
    """1,797 images of 8x8 pixels, enlarged to 16x16; a fixed third is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(y)).numpy(), test_size=1 / 3, random_state=0, stratify=labels)
    return Data(TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]), 10, 1, 16)


def _cifar(name: str, root: str | None) -> Data:
    """32x32 images; four pixels of padding, a random crop and a flip, as the paper's [35]."""
    from torchvision import datasets, transforms

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root or "data"
    normal = [transforms.ToTensor(), transforms.Normalize(*_CIFAR_STATISTICS[name])]
    shaken = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *normal]
    try:
        train = kind(folder, train=True, transform=transforms.Compose(shaken))
        test = kind(folder, train=False, transform=transforms.Compose(normal))
    except RuntimeError as error:
        raise MissingDataError(
            f'no {name} in {folder!r}: get it once with python -c "from torchvision.datasets import {kind.__name__}; '
            f"{kind.__name__}('{folder}', download=True)\", or name its folder with --data"
        ) from error
    return Data(train, test, len(train.classes), 3, 32)


def _folder(root: str | None, size: int) -> Data:
    """root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, with timm's transforms."""
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    splits = [Path(root or "data") / split for split in ("train", "val")]
    for split in splits:
        if not split.is_dir():
            raise MissingDataError(
                f"no folder {split}: --data takes a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"
            )
    train, test = (
        ImageFolder(str(split), create_transform(size, is_training=split.name == "train", no_aug=False))
        for split in splits
    )
    return Data(train, test, len(train.classes), 3, size)


def _labels(data: Any) -> list[int]:
    return data.tensors[1].tolist() if isinstance(data, TensorDataset) else list(data.targets)


def _balanced(labels: list[int], count: int, seed: int) -> list[int]:
    """Indices of `count` images, drawn class by class in turn."""
    if count > len(labels):
        raise ValueError(f"--subset takes at most the {len(labels)} training images, got {count}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    turns: dict[int, list[int]] = {}
    for index in order:
        turns.setdefault(labels[index], []).append(index)
    ranked = sorted((rank, place, index) for place, own in enumerate(turns.values()) for rank, index in enumerate(own))
    return [index for _, _, index in ranked[:count]]
