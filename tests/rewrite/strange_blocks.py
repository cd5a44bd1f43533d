"""Residual blocks as users write them: pieces of Python that a symbolic trace does not see as they are."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tensor_only(self, y):
    return y * 0.5 if isinstance(y, Tensor) else -y


def is_tensor(self, y):
    return y + 0.25 if torch.is_tensor(y) else y - 0.25


def has_attribute(self, y):
    return y * 2 if hasattr(y, "untyped_storage") else y


def grad_enabled(self, y):
    return y * 1.5 if torch.is_grad_enabled() else y * 0.5


def by_shape(self, y):
    return y * 0.5 if y.shape[-1] > 12 else y


def by_exception(self, y):
    try:
        return y * float(y.dim())
    except Exception:
        return -y


def python_draw(self, y):
    return y * 0 if self.training and random.random() < 0.5 else y


def torch_draw(self, y):
    return y / 2 if torch.rand(1).item() < 0.5 else y


def plain_attribute(self, y):
    return y * self.alpha


def in_place(self, y):
    y = y.clone()
    y *= 0.5
    y -= 0.125
    y /= 1.5
    return y


def alias(self, y):
    y = y * 1.0
    z = y
    z.mul_(-0.5)
    return y


def alias_of_an_activation(self, y):
    """Without gradients only: autograd refuses to change what a ReLU has put out."""
    z = y
    z.mul_(-0.5)
    return y


def alias_of_an_activation_before_a_pool(self, y):
    z = y
    z.mul_(-0.5)
    return F.avg_pool2d(y, 3, 1, 1)


def unused_result(self, y):
    y = y * 1.0
    y.add_(0.5)
    return y


def no_grad_region(self, y):
    with torch.no_grad():
        shift = y.mean((2, 3), keepdim=True)
    return y - shift


def enable_grad_region(self, y):
    with torch.enable_grad():
        return y * 0.75


def autocast_off_region(self, y):
    with torch.autocast("cpu", enabled=False):
        return y * 1.25


def counts(self, y):
    self.calls += 1
    return y


def keeps_features(self, y):
    self.features = y.detach()
    return y


def constant_tensor(self, y):
    return y * torch.tensor(0.5) + torch.tensor([0.25]).to(y.device)


def noise(self, y):
    return y + torch.randn(y.shape, device=y.device) if self.training else y


def in_a_list(self, y):
    maps = [y, y * 2]
    maps[0] = maps[0] + 0.5
    return maps[0] + maps[-1]


def by_buffer(self, y):
    self.seen += 1
    return y * 0.5


def functional_dropout(self, y):
    return F.dropout(y, 0.3, self.training)


def negated_in_training(self, y):
    return -y if self.training else y


def negated_without_gradients(self, y):
    return y if torch.is_grad_enabled() else -y


def random_sign(self, y):
    return -y if random.random() < 0.5 else y


def numpy_sign(self, y):
    return -y if np.random.rand() < 0.5 else y


def behind_the_version(self, y):
    """What is got by .data has a version counter of its own."""
    y = y * 1.0
    y.data.mul_(-0.5)
    return y


def activation_behind_the_version(self, y):
    y.data.mul_(-0.5)
    return y


def data_assigned(self, y):
    y = y * 1.0
    y.data = -y.data
    return y


def against_what_was_kept(self, y):
    """A state of the user's own from one call to the next."""
    if self.features is not None:
        y = -y
    self.features = y.detach()
    return y


def counts_its_parts(self, y):
    return y / len(list(self.children()))


def own_class_of_identity(self, y):
    return self.negative(y)


class Negative(nn.Identity):
    """A subclass that is something else than its class."""

    def forward(self, x):
        return -x


def nothing(self, y):
    return y


ODDITIES = [
    nothing, tensor_only, is_tensor, has_attribute, grad_enabled, by_shape, by_exception, python_draw, torch_draw,
    plain_attribute, in_place, alias, unused_result, no_grad_region, enable_grad_region, autocast_off_region, counts,
    keeps_features, constant_tensor, noise, in_a_list, by_buffer, functional_dropout, negated_in_training,
    negated_without_gradients, random_sign, numpy_sign, behind_the_version, data_assigned, against_what_was_kept,
    counts_its_parts, own_class_of_identity,
]  # fmt: skip

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
