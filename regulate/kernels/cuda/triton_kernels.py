"""The Triton kernels of a light cell's step; `triton_step` calls them.

A gate at a pixel is a sum over nine taps of X and of H with two weights each, the product of the 3x3's and the
mix's: `b + sum_t w_t (m_x X_t + m_h H_t)`. One program computes all gates for a tile of pixels and channels and
their activations; the taps hit the cache, so that X, H and C are read once and the results written once. Sums
are in float32 whatever the maps are. Maps have one stride per pixel and one per channel, which covers NCHW and
channels last; `wx`, `wh` are (G, 9, C) and `bias` (G, C), in float32.

Gates by cell, in the order of the parameters: rnn n; gru r, z and, in a second pass, n; lstm i, f, g, o.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # The exponential of a number that is not positive cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    # Near zero that difference loses its digits.
    s = x * x
    small = x * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0))))
    return tl.where(s < 0.01, small, large)


@triton.jit
def _tile(pixels, C, sn, sp, sc, P: tl.constexpr, B: tl.constexpr):
    """Of this program: the start of its image, its pixels and channels, where they lie and which there are."""
    tiles = tl.cdiv(pixels, P)
    at = (tl.program_id(0) // tiles).to(tl.int64) * sn
    p = (tl.program_id(0) % tiles) * P + tl.arange(0, P)
    c = tl.program_id(1) * B + tl.arange(0, B)
    where = at + p[:, None] * sp + c[None, :] * sc
    return at, p, c, where, (p < pixels)[:, None] & (c < C)[None, :]


@triton.jit
def _tap(image, p, c, t, H, W, C, sp, sc):
    """Return an image at tap t of the pixels p; zero outside."""
    dy = t // 3 - 1
    dx = t % 3 - 1
    y = p // W + dy
    x = p % W + dx
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (p < H * W)
    where = (y * W + x)[:, None] * sp + c[None, :] * sc
    return tl.load(image + where, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _row(values, row, c, C):
    """One row of a (rows, C) array, for all pixels of a tile."""
    return tl.load(values + row * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _gates(x, h, wx, wh, bias, p, c, H, W, C, sp, sc, G: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr):
    """Return the first G gates of a tile before their activations; the others are zero."""
    none = tl.zeros([P, c.shape[0]], tl.float32)
    g0 = none + _row(bias, 0, c, C)
    g1 = none
    g2 = none
    g3 = none
    if G > 1:
        g1 = none + _row(bias, 1, c, C)
    if G > 2:
        g2 = none + _row(bias, 2, c, C)
        g3 = none + _row(bias, 3, c, C)
    for t in tl.static_range(9):
        xt = _tap(x, p, c, t, H, W, C, sp, sc)
        ht = none
        if STATE:
            ht = _tap(h, p, c, t, H, W, C, sp, sc)
        g0 += _row(wx, t, c, C) * xt + _row(wh, t, c, C) * ht
        if G > 1:
            g1 += _row(wx, 9 + t, c, C) * xt + _row(wh, 9 + t, c, C) * ht
        if G > 2:
            g2 += _row(wx, 18 + t, c, C) * xt + _row(wh, 18 + t, c, C) * ht
            g3 += _row(wx, 27 + t, c, C) * xt + _row(wh, 27 + t, c, C) * ht
    return g0, g1, g2, g3


@triton.jit
def rnn_forward(x, h, wx, wh, bias, new, H, W, C, sn, sp, sc, STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """H."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g, _, _, _ = _gates(x + at, h + at, wx, wh, bias, p, c, H, W, C, sp, sc, 1, STATE, P)
    tl.store(new + where, _tanh(g), mask=there)


@triton.jit
def rnn_backward(x, h, wx, wh, bias, dh, d, H, W, C, sn, sp, sc, STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Return the gradient of n before its activation."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g, _, _, _ = _gates(x + at, h + at, wx, wh, bias, p, c, H, W, C, sp, sc, 1, STATE, P)
    new = _tanh(g)
    tl.store(d + where, tl.load(dh + where, mask=there, other=0.0).to(tl.float32) * (1.0 - new * new), mask=there)


@triton.jit
def gru_reset(x, h, wx, wh, bias, r, z, rh, H, W, C, sn, sp, sc, STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Return the first pass of a GRU, forward and backward: r, z and r.H."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g0, g1, _, _ = _gates(x + at, h + at, wx, wh, bias, p, c, H, W, C, sp, sc, 2, STATE, P)
    reset = _sigmoid(g0)
    tl.store(r + where, reset, mask=there)
    tl.store(z + where, _sigmoid(g1), mask=there)
    if STATE:
        tl.store(rh + where, reset * tl.load(h + where, mask=there, other=0.0).to(tl.float32), mask=there)


@triton.jit
def gru_forward(
    x, rh, wx, wh, bias, h, z, new, H, W, C, sn, sp, sc, STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):
    """Return the second pass: the candidate, from r.H, and H."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g, _, _, _ = _gates(x + at, rh + at, wx, wh, bias, p, c, H, W, C, sp, sc, 1, STATE, P)
    update = tl.load(z + where, mask=there, other=0.0)
    out = update * _tanh(g)
    if STATE:
        out += (1.0 - update) * tl.load(h + where, mask=there, other=0.0).to(tl.float32)
    tl.store(new + where, out, mask=there)


@triton.jit
def gru_backward(
    x, rh, wx, wh, bias, h, z, dh, dn, dz, H, W, C, sn, sp, sc, STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):
    """Return the gradients of the candidate and of z before their activations."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g, _, _, _ = _gates(x + at, rh + at, wx, wh, bias, p, c, H, W, C, sp, sc, 1, STATE, P)
    candidate = _tanh(g)
    update = tl.load(z + where, mask=there, other=0.0)
    d = tl.load(dh + where, mask=there, other=0.0).to(tl.float32)
    old = tl.zeros_like(d)
    if STATE:
        old = tl.load(h + where, mask=there, other=0.0).to(tl.float32)
    tl.store(dn + where, d * update * (1.0 - candidate * candidate), mask=there)
    tl.store(dz + where, d * (candidate - old) * update * (1.0 - update), mask=there)


@triton.jit
def lstm_forward(
    x, h, wx, wh, bias, memory, new, new_memory, H, W, C, sn, sp, sc,
    STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """H and C."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g0, g1, g2, g3 = _gates(x + at, h + at, wx, wh, bias, p, c, H, W, C, sp, sc, 4, STATE, P)
    kept = _sigmoid(g0) * _tanh(g2)
    if STATE:
        kept += _sigmoid(g1) * tl.load(memory + where, mask=there, other=0.0).to(tl.float32)
    tl.store(new_memory + where, kept, mask=there)
    tl.store(new + where, _sigmoid(g3) * _tanh(kept), mask=there)


@triton.jit
def lstm_backward(
    x, h, wx, wh, bias, memory, dh, dc, d0, d1, d2, d3, dc_old, H, W, C, sn, sp, sc,
    STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Return the gradients of i, f, g and o before their activations, and that of the old cell state."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    g0, g1, g2, g3 = _gates(x + at, h + at, wx, wh, bias, p, c, H, W, C, sp, sc, 4, STATE, P)
    i = _sigmoid(g0)
    f = _sigmoid(g1)
    g = _tanh(g2)
    o = _sigmoid(g3)
    old = tl.zeros_like(i)
    if STATE:
        old = tl.load(memory + where, mask=there, other=0.0).to(tl.float32)
    d = tl.load(dh + where, mask=there, other=0.0).to(tl.float32)
    t = _tanh(f * old + i * g)
    inner = tl.load(dc + where, mask=there, other=0.0).to(tl.float32) + d * o * (1.0 - t * t)
    tl.store(d0 + where, inner * g * i * (1.0 - i), mask=there)
    tl.store(d1 + where, inner * old * f * (1.0 - f), mask=there)
    tl.store(d2 + where, inner * i * (1.0 - g * g), mask=there)
    tl.store(d3 + where, d * t * o * (1.0 - o), mask=there)
    tl.store(dc_old + where, inner * f, mask=there)


@triton.jit
def spread(d, wx, wh, dx, dh, H, W, C, sn, sp, sc, sg, G: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """From the gradients of G gates, (G, N, C, H, W), adds to those of X and H: the taps the other way round."""
    at, p, c, where, there = _tile(H * W, C, sn, sp, sc, P, B)
    of_x = tl.load(dx + where, mask=there, other=0.0)
    of_h = tl.load(dh + where, mask=there, other=0.0)
    for k in tl.static_range(G):
        for t in tl.static_range(9):
            dt = _tap(d + k * sg + at, p, c, 8 - t, H, W, C, sp, sc)
            of_x += _row(wx, k * 9 + t, c, C) * dt
            of_h += _row(wh, k * 9 + t, c, C) * dt
    tl.store(dx + where, of_x, mask=there)
    tl.store(dh + where, of_h, mask=there)


@triton.jit
def sums(d, x, h, out, N, H, W, C, sn, sp, sc, sg, PARTS, STATE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """Per gate, part of the batch and channel: the sums of d X_t (rows 0 to 8), d H_t (9 to 17) and d (18).

    `out` is (G, PARTS, 32, C); the grid is (PARTS, channel tiles, G).
    """
    part = tl.program_id(0)
    k = tl.program_id(2)
    c = tl.program_id(1) * B + tl.arange(0, B)
    rows = tl.arange(0, 32)[:, None]
    total = tl.zeros([32, B], tl.float32)
    tiles = tl.cdiv(H * W, P)
    for job in range(part, N * tiles, PARTS):
        n = job // tiles
        at = n * sn
        p = (job % tiles) * P + tl.arange(0, P)
        there = (p < H * W)[:, None] & (c < C)[None, :]
        dt = tl.load(d + k * sg + at + p[:, None] * sp + c[None, :] * sc, mask=there, other=0.0)
        total += tl.where(rows == 18, tl.sum(dt, 0)[None, :], 0.0)
        for t in tl.static_range(9):
            xt = _tap(x + at, p, c, t, H, W, C, sp, sc)
            total += tl.where(rows == t, tl.sum(dt * xt, 0)[None, :], 0.0)
            if STATE:
                ht = _tap(h + at, p, c, t, H, W, C, sp, sc)
                total += tl.where(rows == 9 + t, tl.sum(dt * ht, 0)[None, :], 0.0)
    tl.store(out + ((k * PARTS + part) * 32 + rows) * C + c[None, :], total, mask=(c < C)[None, :])
