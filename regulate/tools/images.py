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
    folder: str | Path, count: int, size: int, card: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Read images, resize and crop them to a square and normalise them.

    Args:
        folder: of images, or of one folder of images for each class; the classes' names are in the order
            of the model's classes.
        count: how many to take, spread evenly over the sorted files.
        size: height and width in pixels.
        card: timm's `pretrained_cfg`, for mean and standard deviation; ImageNet's without it.

    Returns:
        Images (N, 3, size, size), and labels (N,) if there is a folder for each class.

    Raises:
        FileNotFoundError: there are no images.
        ModuleNotFoundError: torchvision is not installed.
    """
    from PIL import Image
    from torchvision.transforms import v2

    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise FileNotFoundError(f"no images in {folder}; give a folder with {', '.join(sorted(ENDINGS))} files")
    files = files[:: max(1, len(files) // count)][:count]
    known = {**_IMAGENET, **{key: card[key] for key in _IMAGENET if card and key in card}}
    shape = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(known["mean"], known["std"]),
        ]
    )
    images = torch.stack([shape(Image.open(path).convert("RGB")) for path in files])
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not classes or any(path.parent.parent != root for path in files):
        return images, None
    return images, torch.tensor([classes.index(path.parent.name) for path in files])
