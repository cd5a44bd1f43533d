"""The CIFAR networks of the paper's Table II: ResNet and SE-ResNet of depth 6n + 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """Option A of He et al. 2015: every second position, new channels zero, nothing to learn.

    Args:
        channels: of the result.
        stride: of the positions.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H/stride, W/stride)."""
        missing = self.channels - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing // 2, missing - missing // 2))


class SqueezeExcite(nn.Module):
    """Channel gates from pooled channels (Hu et al. 2018).

    Args:
        channels: of the map.
        reduction: how many times narrower the hidden layer is.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, with squeeze-and-excitation if asked.

    Args:
        inputs: channels of the input.
        channels: channels of the result.
        stride: of the first convolution.
        shortcut: `"B"` (1x1 convolution) or `"A"` (zero padding) where the shape changes.
        reduction: of squeeze-and-excitation; 0 is without.
    """

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: str, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels, reduction) if reduction else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.downsample = (
                ZeroPadShortcut(channels, stride)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, channels, H/stride, W/stride)."""
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.se(self.bn2(self.conv2(y)))
        return F.relu(self.downsample(x) + y)


class CifarResNet(nn.Module):
    """Stem, three stages of n blocks with 16, 32 and 64 channels, pooling, classifier (Table II).

    Args:
        blocks: n, blocks per stage.
        num_classes: of the classifier; 0 is without one.
        in_channels: of the image.
        shortcut: see `CifarBlock`.
        reduction: see `CifarBlock`.
        widths: channels of the stages.
    """

    def __init__(
        self, blocks: int, num_classes: int, in_channels: int, shortcut: str, reduction: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        inputs = widths[0]
        for index, channels in enumerate(widths):
            first = CifarBlock(inputs, channels, 2 if index else 1, shortcut, reduction)
            others = [CifarBlock(channels, channels, 1, shortcut, reduction) for _ in range(blocks - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *others))
            inputs = channels
        self.fc = nn.Linear(inputs, num_classes) if num_classes else nn.Identity()
        self.stages = len(widths)
        self.input_size = (in_channels, 32, 32)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            x = getattr(self, f"layer{index + 1}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def cifar_resnet(
    depth: int = 20,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    shortcut: str = "B",
    reduction: int = 0,
    width: int = 16,
) -> CifarResNet:
    """Return a ResNet of the paper's CIFAR experiments.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110 and so on.
        num_classes: of the classifier; 0 is without one.
        in_channels: of the image.
        shortcut: `"B"`, 1x1 convolutions where the shape changes (ResNet-20: 272,474 parameters), or
            `"A"`, zero padding (269,722).
        reduction: of squeeze-and-excitation; the paper's SE-ResNet-20 has 8, 0 is a plain ResNet.
        width: channels of the first stage; the second has twice, the third four times as many.

    Raises:
        ValueError: the depth is not 6n + 2, the shortcut is unknown, or there are no channels.

    Examples:
        >>> sum(p.numel() for p in cifar_resnet(20).parameters())
        272474
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2, got {depth}; try {max(8, depth - (depth - 2) % 6)}")
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
    if in_channels < 1:
        raise ValueError(f"an image has 1 channel or more, got in_channels={in_channels}")
    return CifarResNet((depth - 2) // 6, num_classes, in_channels, shortcut, reduction, (width, 2 * width, 4 * width))
