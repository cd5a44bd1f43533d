"""Networks of residual blocks with strange pieces in them, each written by a recipe."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field

import torch
from torch import nn

from .strange_blocks import Negative, nothing

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(), "relu in place": lambda: nn.ReLU(inplace=True), "relu6": lambda: nn.ReLU6(),
    "hardtanh": lambda: nn.Hardtanh(), "silu": lambda: nn.SiLU(), "none": lambda: nn.Identity(),
}  # fmt: skip
POOLS = {
    "none": lambda: nn.Identity(), "average": lambda: nn.AvgPool2d(3, 1, 1),
    "sum": lambda: nn.AvgPool2d(3, 1, 1, divisor_override=1), "largest": lambda: nn.MaxPool2d(3, 1, 1),
    "power": lambda: nn.LPPool2d(2, 1), "dropout": lambda: nn.Dropout(0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
}  # fmt: skip
NORMS = {
    "batch": lambda c: nn.BatchNorm2d(c), "group": lambda c: nn.GroupNorm(2, c), "none": lambda c: nn.Identity(),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a block is written; the oddities stand after the first convolution, before the last one, and after it."""

    norm: str = "batch"
    activation: str = "relu"
    pool: str = "none"
    middle: tuple = (nothing,)
    late: tuple = (nothing,)
    end: tuple = (nothing,)
    leaves_early: bool = False
    adds: str = "plain"
    modes: str = "same"
    container: str = "all"
    convolutions: int = 2
    blocks: int = 2
    extra: dict = field(default_factory=dict)


class Strange(nn.Module):
    """A residual block by a recipe, (N, 8, H, W) to the same."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(recipe.convolutions))
        self.norms = nn.ModuleList(NORMS[recipe.norm](8) for _ in range(recipe.convolutions))
        self.act, self.pool = ACTIVATIONS[recipe.activation](), POOLS[recipe.pool]()
        self.negative = Negative()
        self.alpha, self.calls, self.features = 0.5, 0, None
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.recipe.leaves_early and self.training and random.random() < 0.3:
            return x
        y = x
        for at, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = at == len(self.convs) - 1
            if at:
                y = self.pool(self.act(y))
                for oddity in self.recipe.late if last else self.recipe.middle:
                    y = oddity(self, y)
            y = norm(conv(y))
        for oddity in self.recipe.end:
            y = oddity(self, y)
        return self.added(x, y)

    def added(self, x, y):
        if self.recipe.adds == "in place":
            y += x
            return y
        if self.recipe.adds == "unused":
            y.add_(x)
            return y
        return x + y


class Choosing(nn.Sequential):
    """A container whose code decides which of its blocks run, and in what order."""

    def __init__(self, how: str, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.how = how

    def forward(self, x):
        order = list(range(len(self)))
        if self.training and self.how == "shuffles":
            random.shuffle(order)
        for at in order:
            if not (self.training and self.how == "drops" and random.random() < 0.4):
                x = self[at](x)
        return x


def network(recipe: Recipe) -> nn.Module:
    """A small network of such blocks, with values like a trained one's."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(1)
        blocks = Choosing(recipe.container, *(Strange(recipe) for _ in range(recipe.blocks)))
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks, nn.Conv2d(8, 4, 1))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
    if recipe.modes == "own":
        blocks[-1].eval()
    return model
