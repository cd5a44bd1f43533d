"""Moments of a map by the user's own activation, and statistics at the ends of what a type holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import regulate
from regulate.testing import perturb

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, act, first=8):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(8, first, 3, padding=1), nn.BatchNorm2d(first), act()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


class HalfOfAPReLU(Block):
    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))).chunk(2, 1)[0]))


class GLUThenReLU(Block):
    def __init__(self, act, first):
        super().__init__(lambda: nn.GLU(1), first)
        self.relu = act()

    def forward(self, x):
        return x + self.bn2(self.conv2(self.relu(self.act(self.bn1(self.conv1(x))))))


def network(act=nn.ReLU, kind=Block, **options):
    blocks = nn.Sequential(*(kind(act, **options) for _ in range(2)))
    return perturb(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks), [(X,), (X.flip(0),)]).eval()


def same(model):
    regulated = regulate(model)
    with torch.no_grad():
        x = X.to(next(model.parameters()).dtype)
        assert model(x).isfinite().all()
        return torch.equal(regulated(x), model(x))


@pytest.mark.parametrize(("act", "kind"), [(lambda: nn.PReLU(16), HalfOfAPReLU), (nn.ReLU, GLUThenReLU)])
def test_an_activation_over_more_channels_than_the_map_has(act, kind):
    assert same(network(act, kind, first=16))


def test_hooks_of_an_activation_see_the_maps_of_the_network_alone():
    model, seen = network(nn.SiLU), []

    def hook(module, args, out):
        assert out.dtype == torch.float32, "not the points of a quadrature"
        seen.append(out.shape)

    for block in model[1]:
        block.act.register_forward_hook(hook)
    regulate(model)
    assert seen == []
    assert same(model)


def test_an_activation_that_keeps_what_cannot_be_copied():
    model = network(nn.SiLU)
    model[1][0].act.kept = torch.ones(1, requires_grad=True) * 2
    expected = model(X)
    assert torch.equal(regulate(model, inplace=True)(X), expected)


def test_a_channel_that_is_constant_under_a_norm_without_epsilon():
    model = network()
    with torch.no_grad():
        for block in model[1]:
            block.bn1.weight[3], block.bn1.eps = 0, 0.0
    assert same(model)


def test_a_variance_beyond_half_precision():
    model = network()
    with torch.no_grad():
        for block in model[1]:
            block.bn1.weight[3] = 1000
            block.conv2.weight[:, 3] /= 1000
    regulated, x = regulate(model.half()), X.half()
    with torch.no_grad():
        assert torch.allclose(regulated(x), model(x), atol=2e-2)
