"""The data sets of the experiments: scikit-learn's digits, CIFAR-10 and -100, Fashion-MNIST, image folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset

from . import store
from .folders import Readable, digest
from .images import Images
from .sources import DataError, MissingDataError

NAMES = ("digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder")
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
Split = Images | Dataset[Any]
_TEST = ("val", "valid", "validation", "test")  # what the test images' folder may be called


@dataclass(frozen=True)
class Data:
    """Two splits and what a network has to know of them.

    Args:
        train: images in memory, or a data set of (image, label) that are augmented already.
        test: the same, not augmented.
        classes: how many there are.
        channels: of an image.
        size: height and width in pixels.
        augmented: whether training images in memory are cropped and flipped.
        digest: of a folder of images, from which a run goes on only if it is the same.
    """

    train: Split
    test: Split
    classes: int
    channels: int
    size: int
    augmented: bool = False
    digest: str | None = None


def load(
    name: str,
    root: str | None = None,
    subset: int | None = None,
    seed: int = 0,
    size: int = 224,
    cache: str | None = None,
    like: str | None = None,
    model: str | None = None,
) -> Data:
    """Load a data set.

    Args:
        name: one of `NAMES`.
        root: folder of the data; digits need none.
        subset: how many training images to keep, the same number of each class as far as it goes.
        seed: chooses the subset.
        size: of the images of an image folder, in pixels.
        cache: folder where CIFAR and Fashion-MNIST are kept as arrays; without it `root`.
        model: a timm name, whose mean, deviation and interpolation the images of a folder get.
        like: "cifar10" gives grey images three channels and a black margin up to 32x32.

    Raises:
        MissingDataError: there is nothing in `root`.
        DataError: what is there is not the data set.
        ValueError: the subset is larger than the data.
    """
    if name == "digits":
        data = _digits()
    elif name == "imagefolder":
        data = _folder(root, size, model)
    else:
        data = _stored(name, Path(root or "data"), Path(cache) if cache else None)
    if like == "cifar10":
        data = _as_cifar(data)
    return data if subset is None else replace(data, train=_part(data.train, subset, seed))


def _digits() -> Data:
    """1,797 images of 8x8 pixels, enlarged to 16x16; a fixed third is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(y)).numpy(), test_size=1 / 3, random_state=0, stratify=labels)
    return Data(Images(x[train], y[train]), Images(x[test], y[test]), 10, 1, 16)


def _stored(name: str, root: Path, cache: Path | None) -> Data:
    """Augmented as in the paper's [35]: four pixels of padding, a random crop and a flip."""
    splits = []
    for split in ("train", "test"):
        pixels, labels = (torch.from_numpy(part) for part in store.arrays(name, split, root, cache))
        splits.append(Images(pixels, labels.long(), *_STATISTICS[name]))
    train, test = splits
    _, channels, size, _ = train.pixels.shape
    return Data(train, test, 100 if name == "cifar100" else 10, channels, size, augmented=True)


def _as_cifar(data: Data) -> Data:
    if not isinstance(data.train, Images) or not isinstance(data.test, Images) or data.size > 32:
        raise ValueError("--like cifar10 takes images of at most 32x32 pixels in memory: digits or fashion_mnist")
    return replace(data, train=_enlarged(data.train), test=_enlarged(data.test), channels=3, size=32)


def _enlarged(images: Images) -> Images:
    margin = 32 - images.pixels.shape[-1]
    edges = (margin // 2, margin - margin // 2) * 2
    pixels = F.pad(images.pixels, edges).repeat(1, 3 // images.pixels.shape[1], 1, 1)
    mean, deviation = (values and values * (3 // len(values)) for values in (images.mean, images.deviation))
    return replace(images, pixels=pixels, mean=mean, deviation=deviation)


def _folder(root: str | None, size: int, model: str | None) -> Data:
    """root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, with timm's transforms."""
    from timm.data import create_transform

    folder, look = Path(root or "data"), _look(model)
    try:
        train = Readable(str(folder / "train"), create_transform(size, is_training=True, **look))
        test = Readable(str(_test_folder(folder)), create_transform(size, **look))
    except FileNotFoundError as error:
        raise MissingDataError(
            f"{error}; --data takes a folder with train/CLASS/*.jpg and val/CLASS/*.jpg (or {', '.join(_TEST[1:])})"
        ) from error
    if train.classes != test.classes:
        raise DataError(f"train and test images in {folder} have other classes: {train.classes} and {test.classes}")
    if len(train.classes) < 2:
        raise DataError(f"a network tells two classes or more apart, and {folder / 'train'} has {train.classes} alone")
    return Data(train, test, len(train.classes), 3, size, digest=digest(train, test))


def _test_folder(folder: Path) -> Path:
    found = [folder / name for name in _TEST if (folder / name).is_dir()]
    return found[0] if found else folder / "val"


def _look(model: str | None) -> dict[str, Any]:
    """Mean, deviation and interpolation of a timm model."""
    from timm import get_pretrained_cfg
    from timm.data import resolve_data_config

    known = get_pretrained_cfg(model) if model else None
    config = resolve_data_config({}, pretrained_cfg=known.to_dict()) if known else {}
    return {name: config[name] for name in ("mean", "std", "interpolation") if name in config}


def _part(split: Any, count: int, seed: int) -> Split:
    if isinstance(split, Images):
        return split.chosen(balanced(split.labels.tolist(), count, seed))
    return Subset(split, balanced(list(split.targets), count, seed).tolist())


def balanced(labels: list[int], count: int, seed: int) -> torch.Tensor:
    """Return indices of `count` images, drawn class by class in turn."""
    if count > len(labels):
        raise ValueError(f"--subset takes at most the {len(labels)} training images, got {count}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    turns: dict[int, list[int]] = {}
    for index in order:
        turns.setdefault(labels[index], []).append(index)
    ranked = sorted((rank, place, index) for place, own in enumerate(turns.values()) for rank, index in enumerate(own))
    return torch.tensor([index for _, _, index in ranked[:count]])
