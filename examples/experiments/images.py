"""Images in memory, as uint8, made into batches as a whole: each image its own crop and flip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BORDER = 4  # pixels around the image, black, before it is cropped


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one split, on the device where batches are made.

    Args:
        pixels: (N, C, H, W), uint8, or float32 where they are normalised already.
        labels: (N,), int64.
        mean: of each channel, of pixels between 0 and 1; None for pixels that are normalised already.
        deviation: of each channel, likewise.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """Return the images on a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def chosen(self, indices: Tensor) -> Images:
        """Return some of the images."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images, normalised and in the channels-last layout, and labels.

        Args:
            indices: on the CPU.
            generator: of the CPU, for crops and flips; None leaves the images as they are.
        """
        here = indices.to(self.pixels.device)
        pixels = self.pixels[here]
        if generator is not None:
            pixels = cropped_and_flipped(pixels, generator)
        return self._normalised(pixels), self.labels[here]

    def _normalised(self, pixels: Tensor) -> Tensor:
        if self.mean is None or self.deviation is None:
            return pixels
        mean, deviation = (
            torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (self.mean, self.deviation)
        )
        scale = 1 / (255 * deviation)
        return torch.addcmul(-mean / deviation, pixels.float(), scale)


def cropped_and_flipped(pixels: Tensor, generator: torch.Generator, border: int = BORDER) -> Tensor:
    """Return a batch of which each image is padded with black, cropped and flipped by chance on its own.

    The draws are made on the CPU, so a seed means the same on every device.
    """
    count, channels, height, width = pixels.shape
    top, left = torch.randint(2 * border + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    across = torch.arange(width).expand(count, width)
    across = torch.where(flip[:, None], width - 1 - across, across) + left[:, None]
    down = torch.arange(height) + top[:, None]
    wide = width + 2 * border
    places = (down[:, :, None] * wide + across[:, None, :]).view(count, 1, -1).to(pixels.device)
    padded = torch.nn.functional.pad(pixels, (border,) * 4).view(count, channels, -1)
    return padded.gather(2, places.expand(-1, channels, -1)).view(count, channels, height, width)
