"""What is left of a batch norm in inference."""

from __future__ import annotations

from torch import Tensor, nn


class ScaleShift(nn.Module):
    """`x * scale + shift`, channel by channel.

    Args:
        scale: (C,).
        shift: (C,).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), or any number of axes behind C, to the same."""
        ones = (1,) * (x.dim() - 2)
        return x * self.scale.view(-1, *ones) + self.shift.view(-1, *ones)
