"""Whole regulated blocks against plain modules written from Eq. (2) and Eq. (3), with perturbed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regulate import ConvLSTMCell, kernels, regulate
from regulate.rewrite.guard import regulators

from ..helpers import Watch, network, stir


def fused(part, x, h):
    """ReLU(BN(W * concat[x, H])) and ReLU(BN(H)), from the tensors."""

    def bn(norm, y):
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)

    h = F.relu(bn(part.hidden_norm, h))
    return F.relu(bn(part.mix_norm, F.conv2d(torch.cat([x, h], 1), part.mix.weight))), h


def equation_2(block, cell, x1, state):
    x2 = F.relu(block.bn1(block.conv1(x1)))
    h, *rest = cell(x2, state)
    x3, h = fused(block.regulator, x2, h)
    x4 = block.bn2(block.conv2(x3))
    shortcut = x1 if block.downsample is None else block.downsample(x1)
    return F.relu(shortcut + x4), (h, *rest)


def equation_3(block, cell, x1, state):
    x2 = F.relu(block.bn1(block.conv1(x1)))
    stride = block.conv2.stride[0]
    h, *rest = cell(x2[..., ::stride, ::stride], state)
    x3 = F.relu(block.bn2(block.conv2(x2)))
    x4, h = fused(block.regulator, x3, h)
    x5 = block.bn3(block.conv3(x4))
    shortcut = x1 if block.downsample is None else block.downsample(x1)
    return F.relu(shortcut + x5), (h, *rest)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("kernel", ["light", "dense"])
@pytest.mark.parametrize(
    ("name", "equation"), [("torchvision/resnet18", equation_2), ("torchvision/resnet50", equation_3)]
)
def test_regulated_stage_is_the_equations(name, equation, kernel, cell):
    model = stir(regulate(network(name), cell, kernel=kernel)).double().eval()
    x = torch.randn(2, 64, 9, 13).double()
    with torch.no_grad():
        for stage in (model.layer1, model.layer2):
            expected, state = x, None
            for block in stage:
                expected, state = equation(block, stage[0].regulator.cell, expected, state)
            x = stage(x)
            assert torch.allclose(x, expected, rtol=1e-10, atol=1e-10)


def test_the_memory_reaches_the_output():
    """A dead cell would pass every identity test; perturbing one late block's cell input must show."""
    model = stir(regulate(network("torchvision/resnet18"))).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    with torch.no_grad():
        model.layer1[0].regulator.cell.gates.weight.mul_(1.5)
    assert not torch.allclose(before, model(x), rtol=1e-3)


def test_state_travels_between_blocks_and_not_between_stages():
    model = stir(regulate(network("torchvision/resnet18"))).eval()
    seen = {}
    for path, part in regulators(model):
        part.register_forward_hook(lambda m, args, out, path=path: seen.update({path: out[1]}))
    states = []
    for stage in (model.layer1, model.layer2):
        stage[0].regulator.cell.register_forward_hook(lambda m, args, out: states.append(args[1]))
    model(torch.randn(1, 3, 64, 64))
    assert states[0] is None
    assert states[1] is seen["layer1.0.regulator"]
    assert states[2] is None


def test_how_often_the_formulas_of_an_lstm_pass_over_its_maps():
    """The figures of how-it-works.md; a kernel could do with three reads and two writes."""
    x, cell = torch.randn(2, 64, 12, 12), ConvLSTMCell(64)
    with kernels.use("reference"), torch.no_grad(), Watch(x.numel()) as seen:
        cell(x, (x, x))
    assert (seen.reads, seen.writes) == (33, 25)
