"""Values of a plan: a norm, and where a map comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Norm:
    """Which norm new maps get: it follows the block's.

    Args:
        kind: `"batch"`, `"group"` or `"none"`.
        eps: added to the variance.
        momentum: of the running statistics; `None` is the cumulative average. Batch norm only.
        groups: wished number of groups, reduced to a divisor of the width. Group norm only.
    """

    kind: str
    eps: float = 1e-5
    momentum: float | None = 0.1
    groups: int = 32


@dataclass(frozen=True)
class Source:
    """Some channels of a map, and the norm whose affine parameters tell their mean and variance.

    Args:
        channels: how many.
        norm: path of the batch norm; empty if none is known (unit statistics).
        start: the first of the norm's channels that is meant.
        activation: what lies between norm and map: `"none"`, `"relu"`, a module's path
            (`"module:..."`) or a function (`"function:torch.nn.functional.silu"`).
        gate: how many sigmoid gates scale it; each counts as one half.
    """

    channels: int
    norm: str = ""
    start: int = 0
    activation: str = "none"
    gate: int = 0
