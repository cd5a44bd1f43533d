"""A fusion starts from the moments of the map that it stands in for, through gates, pieces and concatenations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import plan, regulate
from regulate.models.cifar import cifar_resnet
from regulate.rewrite.guard import regulators
from regulate.testing import distance, perturb

from ..helpers import small

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """Has 16 channels behind its first norm, of which something makes the 8 or 16 of the write point."""

    def __init__(self, middle, width):
        super().__init__()
        self.middle = middle
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.middle(self.bn1(self.conv1(x)))))


def half(y):
    return torch.sigmoid(y - y)


# The gates are one half wherever they are, so that what is left is the factor itself.
MIDDLES = {
    "one gate": (16, lambda y: F.relu(y) * half(y)),
    "two gates": (16, lambda y: half(y) * (half(y) * F.relu(y))),
    "first piece": (8, lambda y: F.relu(y).chunk(2, 1)[0]),
    "second piece": (8, lambda y: F.relu(y).chunk(2, 1)[1]),
    "piece of a split": (4, lambda y: y.split(4, 1)[2]),
    "concatenation": (16, lambda y: torch.cat([F.relu(y.chunk(2, 1)[1]), y.chunk(2, 1)[0]], 1)),
    "silu": (16, F.silu),
    "a method": (16, lambda y: y.tanh()),
}


def network(middle, width):
    model = small(Block(middle, width), Block(middle, width))
    perturb(model, [(X,), (X.flip(0),)])
    with torch.no_grad():
        for block in model[1]:  # channels that are told apart by their means
            block.bn1.bias.copy_(torch.linspace(-1.5, 1.5, 16))
    return model.eval()


@pytest.mark.parametrize("name", MIDDLES)
def test_moments_are_those_of_samples(name):
    width, middle = MIDDLES[name]
    model = network(middle, width)
    assert all(source.norm for block in plan(model).blocks for source in block.sources)
    regulated = regulate(model)
    with torch.no_grad():
        assert distance(model(X), regulated(X)) < 1e-5
        for block, other in zip(model[1], regulated[1], strict=True):
            shape = (40_000, 16, 1, 1)
            y = middle(block.bn1.weight.view(1, -1, 1, 1) * torch.randn(shape) + block.bn1.bias.view(1, -1, 1, 1))
            norm = other.regulator.mix_norm
            assert torch.allclose(norm.running_mean, y.mean((0, 2, 3)), atol=0.03)
            assert torch.allclose(norm.running_var, y.var((0, 2, 3)), rtol=0.1, atol=0.005)


@pytest.mark.parametrize("fusion", ["paper", "residual"])
def test_a_random_start_has_the_deviation_of_its_fan_in(fusion):
    """As docs/paper.md has it."""
    model = regulate(cifar_resnet(14, width=32), init="random", fusion=fusion)
    weights = [(name, p) for _, part in regulators(model) for name, p in part.named_parameters() if p.dim() > 1]
    assert {name for name, _ in weights} == {"mix.weight", "cell.gates.mix", "cell.gates.weight"}
    for _, weight in weights:
        assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.15)
        assert weight.mean().item() == pytest.approx(0, abs=0.15 * weight[0].numel() ** -0.5)
