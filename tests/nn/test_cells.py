"""The cells against the paper's formulas written out, and against torch's own recurrent cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import ConvGRUCell, ConvLSTMCell, ConvRNNCell
from regulate.nn.cells import CELLS, GateConv

C = 3


def randomised(cell: nn.Module) -> nn.Module:
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.5)
    return cell.double()


def light_gate(x, h, mix, taps, bias):
    """Steps (1) and (2) of the paper for one gate, position by position."""
    _, channels, height, width = x.shape
    y = torch.zeros_like(x)
    for i in range(channels):
        pair = torch.stack([x[:, i], h[:, i]], -1) @ mix[i].flatten()
        for row in range(height):
            for column in range(width):
                for a in (-1, 0, 1):
                    for b in (-1, 0, 1):
                        r, c = row + a, column + b
                        if 0 <= r < height and 0 <= c < width:
                            y[:, i, row, column] += taps[i, 0, a + 1, b + 1] * pair[:, r, c]
        y[:, i] += bias[i]
    return y


def dense_gate(x, h, taps, bias):
    both = nn.functional.pad(torch.cat([x, h], 1), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    return torch.einsum("nchwab,ocab->nohw", both, taps) + bias[:, None, None]


def gates(conv: GateConv, x, h):
    """Every gate of a GateConv by the reference."""
    rows = [slice(k * C, (k + 1) * C) for k in range(conv.gates)]
    if conv.kernel == "light":
        return [light_gate(x, h, conv.mix[r], conv.weight[r], conv.bias[r]) for r in rows]
    return [dense_gate(x, h, conv.weight[r], conv.bias[r]) for r in rows]


def reference(name: str, cell, x, state):
    if name == "rnn":
        (n,) = gates(cell.gates, x, state[0])
        return (torch.tanh(n),)
    if name == "gru":
        r, z = (torch.sigmoid(g) for g in gates(cell.gates, x, state[0]))
        (n,) = gates(cell.candidate, x, r * state[0])
        return ((1 - z) * state[0] + z * torch.tanh(n),)
    i, f, g, o = gates(cell.gates, x, state[0])
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@pytest.mark.parametrize("kernel", ["light", "dense"])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_cell_equals_the_formulas(name, kernel):
    cell = randomised(CELLS[name](C, kernel))
    x = torch.randn(2, C, 4, 5).double()
    state = tuple(torch.randn_like(x) for _ in cell(x, None))
    with torch.no_grad():
        for ours, theirs in zip(cell(x, state), reference(name, cell, x, state), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_no_state_is_a_state_of_zeros(name):
    cell = randomised(CELLS[name](C))
    x = torch.randn(2, C, 4, 5).double()
    empty = cell(x, None)
    for a, b in zip(empty, cell(x, tuple(torch.zeros_like(part) for part in empty)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_dense_centre_tap_is_torchs_cell(name):
    """On 1x1 maps only the centre tap counts, and the cell is nn.RNNCell or nn.LSTMCell."""
    cell = randomised(CELLS[name](C, "dense"))
    theirs = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell}[name](C, C).double()
    with torch.no_grad():
        centre = cell.gates.weight[:, :, 1, 1]
        theirs.weight_ih.copy_(centre[:, :C])
        theirs.weight_hh.copy_(centre[:, C:])
        theirs.bias_ih.copy_(cell.gates.bias)
        theirs.bias_hh.zero_()
        x, h, c = (torch.randn(5, C).double() for _ in range(3))
        wide = [v[:, :, None, None] for v in (x, h, c)]
        ours = cell(wide[0], tuple(wide[1:] if name == "lstm" else wide[1:2]))
        expected = theirs(x, (h, c)) if name == "lstm" else (theirs(x, h),)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a[:, :, 0, 0], b, rtol=1e-10, atol=1e-12)


def test_light_kernel_mixes_each_channel_with_its_own_hidden_channel():
    conv = GateConv(4, gates=2)
    nn.init.normal_(conv.bias)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    h = torch.randn(1, 4, 5, 5, requires_grad=True)
    for gate in conv(x, h):
        for channel in range(4):
            for source in (x, h):
                (grad,) = torch.autograd.grad(gate[0, channel].sum(), source, retain_graph=True)
                touched = grad[0].abs().sum((1, 2)) > 0
                assert touched.tolist() == [i == channel for i in range(4)]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["light", "dense"])
def test_every_number_of_axes(dims, kernel):
    x = torch.randn(2, C, *(4, 5, 6)[:dims])
    h, c = ConvLSTMCell(C, kernel, dims)(x)
    assert h.shape == c.shape == x.shape


@pytest.mark.parametrize(("cell", "gate_count"), [(ConvRNNCell, 1), (ConvGRUCell, 3), (ConvLSTMCell, 4)])
def test_parameters_of_a_cell(cell, gate_count):
    n = 16
    assert sum(p.numel() for p in cell(n).parameters()) == 12 * gate_count * n
    dense = sum(p.numel() for p in cell(n, "dense").parameters())
    assert dense == gate_count * (18 * n * n + n)


def test_start_values():
    torch.manual_seed(0)
    cell = ConvLSTMCell(512)
    assert cell.gates.mix.std().item() == pytest.approx(2**-0.5, rel=0.03)
    assert cell.gates.weight.std().item() == pytest.approx(1 / 3, rel=0.03)
    i, f, g, o = cell.gates.bias.chunk(4)
    assert f.eq(1).all()
    assert not torch.cat([i, g, o]).any()
    assert ConvLSTMCell(64, "dense").gates.weight.std().item() == pytest.approx((18 * 64) ** -0.5, rel=0.03)


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="'light' or 'dense'"):
        GateConv(4, 1, "heavy")
