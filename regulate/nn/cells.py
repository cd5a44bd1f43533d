"""The recurrent cells: Eq. (1) of the paper, ConvGRU and ConvLSTM, and their gate convolution.

Cell protocol, for cells of your own as well: an `nn.Module` with

    forward(x, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]

`x` is (N, C, H, W), or (N, C, D, H, W) in a 3-D network. The result is the new state, its first
element the hidden state H of x's shape and dtype; `None` stands for a state of zeros. A cell writes neither
to x nor to its state. The block replaces the first element by its normalised, rectified H before the state
travels on, as a plain tuple, to the next block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from .._compat.modules import is_watched
from ..config import CELL_GATES
from ..kernels import reference as equations
from ..kernels.reference import State, dense_gates, light_gates

Step = Callable[[Tensor, Tensor | None], State]


class GateConv(nn.Module):
    """`W * [X, H] + b` for several gates at once: every matrix product of a cell.

    `"light"` is the paper's two steps: a grouped 1x1 convolution 2C -> C whose group i mixes X_i with
    H_i, then a depthwise 3x3. A gate has 2C + 9C weights and C biases. `"dense"` is one full 3x3
    convolution 2C -> C with 18C^2 weights. Gates lie one after the other on the first axis of each
    parameter: `mix` (G*C, 2, 1, 1), `weight` (G*C, 1, 3, 3) or dense (G*C, 2C, 3, 3), `bias` (G*C,).

    Args:
        channels: C, the width of X, of H and of each gate.
        gates: G, how many gates are computed.
        kernel: `"light"` or `"dense"`.
        dims: number of spatial axes, 1 to 3.

    Examples:
        >>> gates = GateConv(8, gates=2)
        >>> i, f = gates(torch.ones(1, 8, 5, 5), torch.zeros(1, 8, 5, 5))
        >>> i.shape
        torch.Size([1, 8, 5, 5])
    """

    mix: nn.Parameter | None

    def __init__(self, channels: int, gates: int, kernel: str = "light", dims: int = 2) -> None:
        super().__init__()
        if kernel not in ("light", "dense"):
            raise ValueError(f"kernel must be 'light' or 'dense', got {kernel!r}")
        self.channels, self.gates, self.kernel, self.dims = channels, gates, kernel, dims
        light = kernel == "light"
        rows, taps, ones = gates * channels, (3,) * dims, (1,) * dims
        self.mix = nn.Parameter(torch.empty(rows, 2, *ones)) if light else None
        self.weight = nn.Parameter(torch.empty(rows, 1 if light else 2 * channels, *taps))
        self.bias = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of standard deviation 1/sqrt(fan_in), biases zero. Draws from the global generator."""
        for weight in (self.mix, self.weight):
            if weight is not None:
                nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, h: Tensor | None, step: Step | None = None) -> tuple[Tensor, ...]:
        """Gate pre-activations; or, by one pass over the maps, what a cell makes of them.

        Args:
            x: input, (N, C, H, W).
            h: hidden state, of x's shape; None for zeros.
            step: computes the cell's new state from x, h and this module's weights. A cell hands it over unless
                somebody waits for the gates: a hook on this module that sees its output, a `forward` of another class.

        Returns:
            One tensor of x's shape per gate; the new state if there is a step.
        """
        return self.products(x, torch.zeros_like(x) if h is None else h) if step is None else step(x, h)

    def products(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """Gate pre-activations, one tensor of x's shape (N, C, H, W) per gate."""
        sizes = {"gates": self.gates, "width": self.channels, "dims": self.dims}
        if self.mix is None:
            return dense_gates(x, h, self.weight, self.bias, **sizes)
        return light_gates(x, h, self.mix, self.weight, self.bias, **sizes)

    def extra_repr(self) -> str:
        """Return what `print(cell)` shows."""
        return f"{self.channels}, gates={self.gates}, kernel={self.kernel!r}"


class _Cell(nn.Module):
    """A cell of the library: its gate convolutions, as its row of `CELL_GATES` says, and its step by the equations."""

    _name: ClassVar[str]

    def __init__(self, channels: int, kernel: str = "light", dims: int = 2) -> None:
        super().__init__()
        for conv, gates in CELL_GATES[self._name].items():
            self.add_module(conv, GateConv(channels, len(gates), kernel, dims))

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """One step. x: (N, C, H, W); state: of the step before, or None for zeros. Returns the new state."""
        convs = tuple(getattr(self, conv) for conv in CELL_GATES[self._name])
        if not all(_takes_steps(conv) for conv in convs):
            return getattr(equations, self._name)(x, state, *convs)  # type: ignore[no-any-return]
        h, *rest = state or (None,)
        return _called(self._name, convs, rest, 0, x, h)


class ConvRNNCell(_Cell):
    """Eq. (1): `H = tanh(W * [X, H'] + b)`. State: `(H,)`.

    Args:
        channels: C, width of input and hidden state.
        kernel: `"light"` or `"dense"`, see `GateConv`.
        dims: number of spatial axes.

    Examples:
        >>> cell = ConvRNNCell(8)
        >>> (h,) = cell(torch.ones(1, 8, 5, 5), None)
        >>> h.shape
        torch.Size([1, 8, 5, 5])
    """

    _name = "rnn"


class ConvGRUCell(_Cell):
    """ConvGRU (Ballas et al. 2016), with Eq. (1)'s convolution. State: `(H,)`.

    `r, z = sigmoid(W * [X, H'])`, `n = tanh(W * [X, r.H'])`, `H = (1 - z).H' + z.n`. The candidate n
    convolves the reset state, so it needs a second pass: `gates` holds r and z, `candidate` n.

    Args:
        channels: C, width of input and hidden state.
        kernel: `"light"` or `"dense"`, see `GateConv`.
        dims: number of spatial axes.

    Examples:
        >>> cell = ConvGRUCell(8)
        >>> (h,) = cell(torch.ones(1, 8, 5, 5), None)
        >>> h.shape
        torch.Size([1, 8, 5, 5])
    """

    _name = "gru"


class ConvLSTMCell(_Cell):
    """ConvLSTM (Shi et al. 2015) without peepholes, with Eq. (1)'s convolution. State: `(H, C)`.

    `i, f, g, o = W * [X, H']`, `C = sigmoid(f).C' + sigmoid(i).tanh(g)`, `H = sigmoid(o).tanh(C)`.
    The forget gate's bias starts at 1.

    Args:
        channels: C, width of input, hidden and cell state.
        kernel: `"light"` or `"dense"`, see `GateConv`.
        dims: number of spatial axes.

    Examples:
        >>> cell = ConvLSTMCell(8)
        >>> h, c = cell(torch.ones(1, 8, 5, 5), None)
        >>> h.shape == c.shape
        True
    """

    _name = "lstm"

    def __init__(self, channels: int, kernel: str = "light", dims: int = 2) -> None:
        super().__init__(channels, kernel, dims)
        with torch.no_grad():
            self.gates.bias[channels : 2 * channels].fill_(1.0)  # type: ignore[union-attr, index]


def _called(name: str, convs: tuple[GateConv, ...], rest: list[Tensor], at: int, x: Tensor, h: Tensor | None) -> State:
    """Call the gate convolutions from one on, each with a step that calls the next one; in the last, take the step.

    By the kernel that fits, or by the equations.
    """
    if at < len(convs):
        # Not a function in a function, which would refer to itself and keep the state until it is collected.
        return convs[at](x, h, partial(_called, name, convs, rest, at + 1))  # type: ignore[no-any-return]
    state = None if h is None else (h, *rest)
    weights: Any = tuple((conv.mix, conv.weight, conv.bias) for conv in convs)
    fast = kernels.step(name, x, state, weights)
    if fast is not None:
        return fast
    return getattr(equations, name)(x, state, *(conv.products for conv in convs))  # type: ignore[no-any-return]


def _takes_steps(conv: nn.Module) -> bool:
    """Check whether a gate convolution may be asked for more than its gates."""
    own = type(conv).forward is GateConv.forward and "forward" not in conv.__dict__
    return own and conv.mix is not None and not is_watched(conv)


def gate_names(cell: nn.Module, conv: str) -> str:
    """Return the names of the gates that a gate convolution of a cell computes; none for a cell of your own."""
    return CELL_GATES[cell._name].get(conv, "") if isinstance(cell, _Cell) else ""


CELLS = {cell._name: cell for cell in _Cell.__subclasses__()}
