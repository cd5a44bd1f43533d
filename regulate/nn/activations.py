"""The activation of a fusion, which takes nothing from the map that the fusion stands in for."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def activate(name: str, fused: Tensor, unfused: Tensor) -> Tensor:
    """`act(fused) + (unfused - act(unfused))`, the activation at the end of a fusion.

    A fusion has an activation because the map that it replaces comes out of one: act(x) = x, and the second term is
    zero. Should the map come to hold other values, as when a user exchanges the activation before it, that term keeps
    what the activation would cut, and a fusion at its identity start stays the identity.

    Args:
        name: `"relu"`, `"relu6"`, `"hardtanh"` or `"none"`.
        fused: (N, C, H, W), or any other shape.
        unfused: the map before the fusion, of the same shape.
    """
    return fused if name == "none" else with_cut(name, getattr(F, name)(fused), unfused)


def with_cut(name: str, activated: Tensor, unfused: Tensor) -> Tensor:
    """Add what an activation would cut from `unfused`, in the type of `activated`."""
    return activated + cut(name, unfused).type_as(activated)


def cut(name: str, x: Tensor) -> Tensor:
    """`x - act(x)`, what an activation takes from x; where it takes nothing, its gradient is zero.

    So written that no digit is lost: `act(x) + cut(x)` is x, bit by bit, below 2^24 in single precision. At the border
    itself (zero, for ReLU) the gradient is zero, not one.

    Args:
        name: `"relu"`, `"relu6"` or `"hardtanh"`.
        x: any shape.

    Examples:
        >>> import torch
        >>> cut("relu", torch.tensor([-2.0, 3.0])).tolist()
        [-2.0, 0.0]
        >>> cut("relu6", torch.tensor([-2.0, 3.0, 8.0])).tolist()
        [-2.0, 0.0, 2.0]
    """
    if name == "hardtanh":
        return F.relu(x - 1) - F.relu(-1 - x)
    # In one operation, where -relu(-x) is three.
    below = F.hardtanh(x, -math.inf, 0.0)
    return below + F.relu(x - 6) if name == "relu6" else below
