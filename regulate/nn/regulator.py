"""What one block owns of its regulator: the norm of H and the fusion of H into the block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference import State
from ..schema.values import Norm
from .activations import activate
from .layers import BatchNormReLU2d, Mix2d

_BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: Mix2d, 3: nn.Conv3d}
_BUILT = {*_BATCH.values(), *CONV.values(), BatchNormReLU2d, nn.GroupNorm, nn.Identity}


def build_norm(norm: Norm, channels: int, dims: int, rectified: bool = False) -> nn.Module:
    """Build a norm for maps of `channels` channels and `dims` spatial axes.

    Args:
        norm: which.
        channels: C.
        dims: number of spatial axes.
        rectified: a ReLU follows; a batch norm of images then does that as well.
    """
    if norm.kind == "batch":
        kind = BatchNormReLU2d if dims == 2 and rectified else _BATCH[dims]
        return kind(channels, eps=norm.eps, momentum=norm.momentum)
    if norm.kind == "group":
        return nn.GroupNorm(math.gcd(norm.groups, channels), channels, eps=norm.eps)
    return nn.Identity()


class Fusion(nn.Module):
    """Normalises H and fuses it into the block: the H line and the 1x1 fusion of Eq. (2) and (3).

        H = ReLU(norm(H));   y = act(norm(W * concat[x, H]))            (the paper's form)
        H = ReLU(norm(H));   y = act(x + norm(W * concat[x, H]))        (`skip=True`)

    with x - act(x) added to y: zero for every map that comes out of such an activation, see `activate`.
    The paper's form needs a norm with running statistics to start as the identity; the second form is
    for norms without, for norm-free networks, and for `fusion="residual"` (no norm, no activation).

    Args:
        read: R, width of the hidden state.
        write: M, width of the map that H is fused into; W is 1x1, M + R -> M, without bias.
        norm: the norm of H, and of the fused map if `normalise`.
        normalise: whether the fused map is normalised.
        skip: whether x is added to the fused map.
        activation: `"relu"`, `"relu6"`, `"hardtanh"` or `"none"`.
        dims: number of spatial axes.
        cell: the stage's shared cell; the first block of a stage owns it.
    """

    def __init__(
        self,
        read: int,
        write: int,
        norm: Norm,
        *,
        normalise: bool = True,
        skip: bool = False,
        activation: str = "relu",
        dims: int = 2,
        cell: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if cell is not None:
            self.cell = cell
        rectified = activation == "relu" and not skip
        self.hidden_norm = build_norm(norm, read, dims, rectified=True)
        self.mix = CONV[dims](write + read, write, 1, bias=False)
        self.mix_norm = build_norm(norm, write, dims, rectified) if normalise else nn.Identity()
        self.skip, self.activation = skip, activation

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Fuse one step's memory into the block.

        Args:
            x: the map at the write point, (N, M, H, W).
            state: what the cell returned, first the raw hidden state (N, R, H, W).

        Returns:
            The fused map, (N, M, H, W), and the state for the next block, its first element the
            normalised and rectified H; the rest travels raw.
        """
        h = _rectified(self.hidden_norm, state[0])
        # Any other module in the convolution's place takes one map.
        fused = self.mix(x, h) if isinstance(self.mix, Mix2d) else self.mix(torch.cat([x, h], 1))
        return self._finish(fused, x), (h, *state[1:])

    def _finish(self, fused: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.mix_norm, BatchNormReLU2d):
            return self.mix_norm(fused, x)  # type: ignore[no-any-return]
        fused = self.mix_norm(fused)
        return activate(self.activation, x + fused if self.skip else fused, x)

    def __repr__(self) -> str:
        """Return one line for `print(model)`; with a layer of another class inside, as other tools put there, all."""
        parts = dict(self.named_children())
        cell = parts.pop("cell", None)
        if any(type(part) not in _BUILT for part in parts.values()):
            return super().__repr__()
        of_cell = "" if cell is None else f", cell={type(cell).__name__}"
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self).__name__}({self.extra_repr()}{of_cell}, {count:,} parameters)"

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the fusion itself."""
        widths = ""
        if type(self.mix) in _BUILT:
            write, both = self.mix.weight.shape[:2]
            widths = f"{both - write} into {write}, "
        return f"{widths}activation={self.activation!r}{', skip=True' if self.skip else ''}"


def _rectified(norm: nn.Module, x: Tensor) -> Tensor:
    """`ReLU(norm(x))`; a norm that another tool has put in the place of ours does not rectify."""
    y: Tensor = norm(x)
    return y if isinstance(norm, BatchNormReLU2d) else F.relu(y)
