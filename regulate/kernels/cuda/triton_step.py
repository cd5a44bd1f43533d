"""One step of a light cell, forward and backward, by the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..reference import GATES, Maybe, Weights
from . import triton_kernels as kernels


def forward(cell: str, x: Tensor, h: Maybe, c: Maybe, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One step, see `native.forward`. Any float types; x, h and c of one memory format, computed in float32.

    Args:
        cell: `"rnn"`, `"gru"` or `"lstm"`.
        x: input, (N, C, H, W).
        h: hidden state, or None for zeros.
        c: cell state of an LSTM, or None for zeros.
        weights: mix, weight and bias of all gates, the candidate last.
        dtype: of the results.
    """
    launch = _Launch(x, h)
    wx, wh, bias = _taps(weights, GATES[cell])
    new = torch.empty_like(x, dtype=dtype)
    memory = torch.empty_like(new) if cell == "lstm" else x.new_empty(0, dtype=dtype)
    old = x if h is None else h
    if cell == "rnn":
        launch(kernels.rnn_forward, x, old, wx, wh, bias, new)
    elif cell == "lstm":
        launch(kernels.lstm_forward, x, old, wx, wh, bias, x if c is None else c, new, memory)
    else:
        _, z, rh = _reset(launch, x, old, wx, wh, bias)
        launch(kernels.gru_forward, x, rh, wx[2], wh[2], bias[2], old, z, new)
    return new, memory


def backward(cell: str, x: Tensor, h: Maybe, c: Maybe, weights: Weights, dh: Tensor, dc: Maybe) -> tuple[Tensor, ...]:
    """Return the gradients of x, h, c (empty for a cell without), mix, weight and bias, see `native.backward`."""
    launch = _Launch(x, h)
    wx, wh, bias = _taps(weights, GATES[cell])
    old = x if h is None else h
    d = x.new_empty((GATES[cell], *x.shape), dtype=torch.float32).as_strided(
        (GATES[cell], *x.shape), (x.numel(), *x.stride())
    )
    dx, dh_old = (torch.zeros_like(x, dtype=torch.float32) for _ in range(2))
    dc_old = torch.empty_like(x if c is None else c) if cell == "lstm" else x.new_empty(0)
    if cell == "rnn":
        launch(kernels.rnn_backward, x, old, wx, wh, bias, dh, d)
    elif cell == "lstm":
        dc = torch.zeros_like(dh) if dc is None else dc
        launch(kernels.lstm_backward, x, old, wx, wh, bias, x if c is None else c, dh, dc, *d, dc_old)
    else:
        r, z, rh = _reset(launch, x, old, wx, wh, bias)
        launch(kernels.gru_backward, x, rh, wx[2], wh[2], bias[2], old, z, dh, d[2], d[1])
        reset = torch.zeros_like(dx)
        launch.spread(d[2:], wx[2], wh[2], dx, reset)
        d[0] = 0 if h is None else reset * h * r * (1 - r)
        dh_old += dh * (1 - z) + reset * r
        launch.spread(d[:2], wx, wh, dx, dh_old)
        totals = torch.cat([launch.sums(d[:2], x, old), launch.sums(d[2:], x, rh)])
        return dx.to(x.dtype), dh_old.to(old.dtype), dc_old, *_parameters(totals, weights)
    launch.spread(d, wx, wh, dx, dh_old)
    return dx.to(x.dtype), dh_old.to(old.dtype), dc_old, *_parameters(launch.sums(d, x, old), weights)


def _reset(launch: _Launch, x: Tensor, h: Tensor, *taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r, z, rh = (torch.empty_like(x, dtype=torch.float32) for _ in range(3))
    launch(kernels.gru_reset, x, h, *taps, r, z, rh)
    return r, z, rh


def _taps(weights: Weights, gates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of X's and H's taps, (G, 9, C) each, and the biases, (G, C), in float32."""
    mix, weight, bias = weights
    mixes = mix.float().view(gates, -1, 2)
    each = weight.float().view(gates, -1, 9)
    of_x, of_h = ((each * mixes[..., k : k + 1]).transpose(1, 2).contiguous() for k in (0, 1))
    return of_x, of_h, bias.float().view(gates, -1)


def _parameters(totals: Tensor, weights: Weights) -> tuple[Tensor, ...]:
    """From the sums of d X_t, d H_t and d, (G, 32, C), the gradients of mix, weight and bias."""
    mix, weight, bias = weights
    gates = len(totals)
    mixes, each = mix.float().view(gates, -1, 2), weight.float().view(gates, -1, 9)
    of_x, of_h = totals[:, :9].transpose(1, 2), totals[:, 9:18].transpose(1, 2)
    dmix = torch.stack([(of_x * each).sum(-1), (of_h * each).sum(-1)], -1)
    dweight = of_x * mixes[..., :1] + of_h * mixes[..., 1:]
    return (
        dmix.view_as(mix).to(mix),
        dweight.reshape(weight.shape).contiguous().to(weight),
        totals[:, 18].reshape(-1).to(bias),
    )


class _Launch:
    """Runs kernels over the maps of one step: their sizes, strides and tiles."""

    def __init__(self, x: Tensor, h: Maybe) -> None:
        self.batch, self.channels, height, width = x.shape
        last = not x.is_contiguous()
        pixel, channel = (self.channels, 1) if last else (1, height * width)
        self.sizes = (height, width, self.channels, self.channels * height * width, pixel, channel)
        self.state = h is not None
        wide = triton.next_power_of_2(self.channels)
        self.block = min(64, wide) if last else 1
        self.tile = 16 if last else min(512, max(16, triton.next_power_of_2(height * width)))

    def __call__(self, kernel: Any, *tensors: Tensor) -> None:
        if self.batch * self.channels:
            kernel[self._grid()](*tensors, *self.sizes, STATE=self.state, P=self.tile, B=self.block)

    def _grid(self) -> tuple[int, int]:
        height, width = self.sizes[:2]
        return self.batch * triton.cdiv(height * width, self.tile), triton.cdiv(self.channels, self.block)

    def spread(self, d: Tensor, wx: Tensor, wh: Tensor, dx: Tensor, dh: Tensor) -> None:
        """Add to dx and dh, in float32, from the gradients of the gates, (G, N, C, H, W)."""
        if d.numel():
            kernels.spread[self._grid()](
                d, wx, wh, dx, dh, *self.sizes, d.stride(0), G=len(d), P=self.tile, B=self.block
            )  # fmt: skip

    def sums(self, d: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """Return the sums that the parameters' gradients are made of, (G, 32, C)."""
        tiles, blocks = self._grid()
        # Enough programs for a large GPU, and sums of their own for each: the result does not depend on their order.
        parts = max(1, min(tiles, 2048 // (blocks * len(d))))
        out = d.new_zeros((len(d), parts, 32, self.channels))
        if d.numel():
            kernels.sums[(parts, blocks, len(d))](
                d, x, h, out, self.batch, *self.sizes, d.stride(0), parts, STATE=self.state, P=self.tile, B=self.block
            )  # fmt: skip
        return out.sum(1)
