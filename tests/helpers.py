"""What several test files need: models by name, networks that look trained, perturbed regulators."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regulate import regulate
from regulate.models.by_name import load_model
from regulate.models.cifar import CifarBlock, cifar_resnet
from regulate.rewrite.guard import regulators
from regulate.testing import example_inputs, perturb
from regulate.utils.modes import private_rng


def network(name: str, size: int = 64) -> nn.Module:
    """A network by name, `cifar/20` for the CIFAR ones, with the look of a trained one, in eval mode."""
    if name.startswith("cifar/"):
        model: nn.Module = cifar_resnet(int(name[6:]))
    elif not name.startswith("torchvision/") and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    else:
        model = load_model(name)
    return perturb(model, [example_inputs(model, (3, size, size), batch=8, seed=s) for s in (1, 2)]).eval()


def small(*blocks: nn.Module, kind: type[nn.Module] = nn.Sequential) -> nn.Module:
    """A convolution and a container of residual blocks of 8 channels, two if none are given."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), kind(*(blocks or (small_block(), small_block()))))


def small_block() -> nn.Module:
    return CifarBlock(8, 8, 1, "B", 0)


def stir(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Moves every new parameter and statistic away from its start, so that dead paths show."""
    with private_rng(3, 0), torch.no_grad():
        for _, part in regulators(model):
            for parameter in part.parameters():
                parameter.add_(scale * torch.randn(parameter.shape).to(parameter))
            for name, buffer in part.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(scale * torch.randn(buffer.shape).to(buffer))
                if name.endswith("running_var"):
                    buffer.mul_(1 + scale * torch.rand(buffer.shape).to(buffer))
    return model


def stirred(model: nn.Module, cell: str = "lstm", **options: object) -> nn.Module:
    return stir(regulate(model, cell, **options)).eval()


class Watch(TorchDispatchMode):
    """Torch's operators as they run: their names, and how often they read and write maps of a size, views aside."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size, self.names, self.reads, self.writes = size, [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if not function.is_view:
            self.reads += self.maps((args, kwargs))
            self.writes += self.maps(out)
        return out

    def maps(self, tensors) -> int:
        return sum(t.numel() // self.size for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


class Block(nn.Module):
    """A residual block of a user's own, (N, 8, H, W) to the same."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
