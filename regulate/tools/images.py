"""Images of a folder as one batch, for figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pictures(
    folder: str | Path, count: int, size: int, card: Mapping[str, Any] | None = None, channels: int = 3
) -> tuple[Tensor, Tensor | None]:
    """Read images, resize and crop them to a square and normalise them.

    Args:
        folder: of images, or of one folder of images for each class; the classes' names are in the order
            of the model's classes. Hidden files and folders, and folders without images, do not count.
        count: how many to take, spread evenly over the sorted files.
        size: height and width in pixels.
        card: timm's `pretrained_cfg`, for mean and standard deviation; ImageNet's without it.
        channels: 3, or 1 for grey images, whose mean and deviation are the averages of the three.

    Returns:
        Images (N, channels, size, size), and labels (N,) if there is a folder for each class.

    Raises:
        ValueError: there is another number of channels.
        FileNotFoundError: there are no images.
        ModuleNotFoundError: torchvision is not installed.
    """
    from PIL import Image
    from torchvision.transforms import v2

    if channels not in (1, 3):
        raise ValueError(
            f"image files have 3 channels, or 1 in grey; the network takes {channels}: give --in-chans 3 or 1"
        )
    root = Path(folder)
    images = (path for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
    files = sorted(path for path in images if not any(p.startswith(".") for p in path.relative_to(root).parts))
    if not files:
        raise FileNotFoundError(f"no images in {folder}; give a folder with {', '.join(sorted(ENDINGS))} files")
    classes = sorted({path.parent.name for path in files}) if all(path.parent.parent == root for path in files) else []
    files = [files[index * len(files) // count] for index in range(count)] if count < len(files) else files
    known = {**_IMAGENET, **{key: card[key] for key in _IMAGENET if card and key in card}}
    if channels == 1:
        known = {key: [sum(values) / len(values)] for key, values in known.items()}
    shape = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(known["mean"], known["std"]),
        ]
    )
    batch = torch.stack([shape(Image.open(path).convert("RGB" if channels == 3 else "L")) for path in files])
    return batch, torch.tensor([classes.index(path.parent.name) for path in files]) if classes else None
