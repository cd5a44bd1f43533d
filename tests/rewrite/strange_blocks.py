"""Pieces of Python in the residual blocks of users, which a symbolic trace does not see as they are."""

from __future__ import annotations

import random

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


def constant_map(self, y):
    return y * torch.linspace(-0.5, 1.5, y.shape[1], device=y.device).view(1, -1, 1, 1)


def constant_by_symbol(self, y):
    """Which constant it is, a symbol decides in its own way."""
    return y * (torch.full((1,), -0.5) if hasattr(y, "untyped_storage") else torch.ones(1)).to(y.device)


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
    plain_attribute, in_place, alias, unused_result, no_grad_region, enable_grad_region, autocast_off_region,
    counts, keeps_features, constant_tensor, constant_map, constant_by_symbol, noise, in_a_list, by_buffer,
    functional_dropout, negated_in_training, negated_without_gradients, random_sign, numpy_sign, behind_the_version,
    data_assigned, against_what_was_kept, counts_its_parts, own_class_of_identity,
]  # fmt: skip
