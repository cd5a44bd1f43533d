"""The block and the network that the tests of odd ones change, and how two networks are compared."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


class Plain(nn.Module):
    """The block that the others change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def middle(self, y):
        return y

    def forward(self, x):
        return self.act(x + self.bn2(self.conv2(self.middle(self.act(self.bn1(self.conv1(x)))))))


class Listed(nn.Module):
    """Blocks in a list, which the network's own forward goes through."""

    def __init__(self, kind=Plain, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(kind() for _ in range(blocks))

    def chosen(self):
        return self.blocks

    def forward(self, x):
        x = self.stem(x)
        for block in self.chosen():
            x = block(x)
        return x


def of(kind, blocks: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*(kind() for _ in range(blocks))))


def outputs(model, training: bool = False, seed: int = 0, x=X):
    torch.manual_seed(seed)
    random.seed(seed)
    model.train(training)
    with torch.no_grad():
        return model(x)


def assert_same(model, regulated, seeds=range(4)):
    for training in (False, True):
        for seed in seeds:
            a, b = (outputs(copy.deepcopy(m), training, seed) for m in (model, regulated))
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (training, seed)
