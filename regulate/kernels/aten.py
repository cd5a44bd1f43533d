"""The step of a light cell in torch operations that use their buffers again: for every device and float type.

One buffer holds the mix of gate after gate, gates are activated in place, and without gradients they are consumed
in place. With gradients the gates are kept and the mix is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .addresses import has_address
from .reference import Maybe, Weights, differentiable


def step(cell: str, x: Tensor, h: Maybe, c: Maybe, mix: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Maybe]:
    """One step.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        x: input, (N, C, H, W).
        h: hidden state, or None for zeros.
        c: cell state of an LSTM, or None for zeros.
        mix: (G*C, 2, 1, 1), of all gates, the candidate last.
        weight: (G*C, 1, 3, 3).
        bias: (G*C,).

    Returns:
        The new hidden state, and the new cell state of an LSTM.
    """
    tensors = (x, h, c, mix, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Step.apply(cell, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    new_h, new_c, _ = _FORWARD[cell](_Gates(*tensors), False)
    return new_h, new_c


# The new hidden state, the new cell state of an LSTM, and the gates if they are kept.
Made = tuple[Tensor, Maybe, tuple[Tensor, ...]]


class _Gates:
    """The gates of one step before their activation, and their gradients; the mix of each lies in one buffer."""

    def __init__(self, x: Tensor, h: Maybe, c: Maybe, *weights: Tensor) -> None:
        self.x, self.h, self.c, self.weights = x, h, c, weights
        self.width = x.shape[1]
        self.buffer = torch.empty_like(x)

    def _rows(self, k: int, parts: Sequence[Tensor]) -> Weights:
        mix, weight, bias = (part[k * self.width : (k + 1) * self.width] for part in parts)
        return mix, weight, bias

    def _mixed(self, mix: Tensor, h: Maybe) -> Tensor:
        torch.mul(self.x, mix[:, 0], out=self.buffer)
        return self.buffer if h is None else self.buffer.addcmul_(h, mix[:, 1])

    def forward(self, k: int, h: Maybe) -> Tensor:
        mix, weight, bias = self._rows(k, self.weights)
        return F.conv2d(self._mixed(mix, h), weight, bias, padding=1, groups=self.width)

    def backward(self, k: int, h: Maybe, d: Tensor, dx: Tensor, dh: Tensor, grads: Weights) -> None:
        """From d, the gradient of gate k, adds to dx and dh and sets the gate's rows of the parameters' gradients."""
        mix, weight, bias = self._rows(k, self.weights)
        dmix, dweight, dbias = self._rows(k, grads)
        dm, dweight[:], dbias[:] = torch.ops.aten.convolution_backward(
            d, self._mixed(mix, h), weight, bias.shape, (1, 1), (1, 1), (1, 1), False, (0, 0), self.width, (True,) * 3
        )
        dx.addcmul_(dm, mix[:, 0])
        dh.addcmul_(dm, mix[:, 1])
        dmix[:, 0, 0, 0] = torch.mul(dm, self.x, out=self.buffer).sum((0, 2, 3))
        if h is not None:
            dmix[:, 1, 0, 0] = torch.mul(dm, h, out=self.buffer).sum((0, 2, 3))


def _rnn(gates: _Gates, keep: bool) -> Made:
    new = gates.forward(0, gates.h).tanh_()
    return new, None, (new,) if keep else ()


def _gru(gates: _Gates, keep: bool) -> Made:
    h = gates.h
    z = gates.forward(1, h).sigmoid_()
    if h is None:
        # H = z.n, and the reset gate has nothing to reset.
        n = gates.forward(2, None).tanh_()
        return (z * n if keep else z.mul_(n)), None, (z, z, n) if keep else ()
    r = gates.forward(0, h).sigmoid_()
    n = gates.forward(2, r * h if keep else r.mul_(h)).tanh_()
    return torch.lerp(h, n, z), None, (r, z, n) if keep else ()


def _lstm(gates: _Gates, keep: bool) -> Made:
    h, c = gates.h, gates.c
    i, g = gates.forward(0, h).sigmoid_(), gates.forward(2, h).tanh_()
    new_c = i * g if keep else i.mul_(g)
    # Without an old state nothing is forgotten, but its gate has a gradient to give: zero.
    f = gates.forward(1, h).sigmoid_() if c is not None else i
    if c is not None:
        new_c.addcmul_(f, c)
    o = gates.forward(3, h).sigmoid_()
    t = new_c.tanh()
    return (o * t if keep else o.mul_(t)), new_c, (i, f, g, o) if keep else ()


_FORWARD = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: str, x: Tensor, h: Maybe, c: Maybe, *weights: Tensor) -> tuple[Tensor, Maybe]:
        new_h, new_c, gates = _FORWARD[cell](_Gates(x, h, c, *weights), True)
        ctx.cell = cell
        ctx.save_for_backward(x, h, c, *weights, new_c, *gates)
        return new_h, new_c

    @staticmethod
    def backward(ctx: Any, dh: Maybe, dc: Maybe = None) -> tuple[Maybe, ...]:
        x, h, c, mix, weight, bias, new_c, *gates = ctx.saved_tensors
        dh = torch.zeros_like(x) if dh is None else dh
        if torch.is_grad_enabled() or not has_address(dh, dc):
            return None, *differentiable(ctx.cell, (x, h, c, mix, weight, bias), (dh, dc))
        dx, dh_old = torch.zeros_like(x), torch.zeros_like(x)
        grads = (torch.zeros_like(mix), torch.zeros_like(weight), torch.zeros_like(bias))
        of = _Gates(x, h, c, mix, weight, bias)
        dc_old = _BACKWARD[ctx.cell](of, new_c, gates, dh, dc, (dx, dh_old, grads))
        return None, dx, None if h is None else dh_old, None if c is None else dc_old, *grads


Into = tuple[Tensor, Tensor, Weights]
_sigmoid = torch.ops.aten.sigmoid_backward
_tanh = torch.ops.aten.tanh_backward


def _rnn_back(of: _Gates, new_c: Maybe, gates: list[Tensor], dh: Tensor, dc: Maybe, into: Into) -> Maybe:
    of.backward(0, of.h, _tanh(dh, gates[0]), *into)
    return None


def _gru_back(of: _Gates, new_c: Maybe, gates: list[Tensor], dh: Tensor, dc: Maybe, into: Into) -> Maybe:
    r, z, n = gates
    h, (dx, dh_old, grads) = of.h, into
    if h is None:
        of.backward(2, None, _tanh(dh * z, n), *into)
        of.backward(1, None, _sigmoid(dh * n, z), *into)
        return None
    reset = torch.zeros_like(dh)
    of.backward(2, r * h, _tanh(dh * z, n), dx, reset, grads)
    dh_old.addcmul_(dh, 1 - z).addcmul_(reset, r)
    of.backward(1, h, _sigmoid(dh * (n - h), z), *into)
    of.backward(0, h, _sigmoid(reset.mul_(h), r), *into)
    return None


def _lstm_back(of: _Gates, new_c: Maybe, gates: list[Tensor], dh: Tensor, dc: Maybe, into: Into) -> Maybe:
    i, f, g, o = gates
    h, c = of.h, of.c
    assert new_c is not None
    t = new_c.tanh()
    of.backward(3, h, _sigmoid(dh * t, o), *into)
    inner: Tensor = _tanh(dh * o, t)
    if dc is not None:
        inner.add_(dc)
    of.backward(0, h, _sigmoid(inner * g, i), *into)
    of.backward(2, h, _tanh(inner * i, g), *into)
    if c is None:
        return None
    of.backward(1, h, _sigmoid(inner * c, f), *into)
    return inner.mul_(f)


_BACKWARD = {"rnn": _rnn_back, "gru": _gru_back, "lstm": _lstm_back}
