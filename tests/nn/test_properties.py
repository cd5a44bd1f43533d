"""Random residual networks: the finder finds exactly the blocks that were built, and the start is the identity."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn

from regulate import NoBlocksError, plan, regulate
from regulate.analysis.candidates import survey
from regulate.analysis.inputs import sizes
from regulate.analysis.meta_copy import skeleton
from regulate.config import RegulatorConfig
from regulate.testing import distance, perturb

from ..helpers import stir

pytestmark = pytest.mark.gate

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda n: nn.GroupNorm(2, n),
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
    "none": lambda n: nn.Identity(),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu inplace": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "silu inplace": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "elu": nn.ELU,
}


@dataclass(frozen=True)
class Shape:
    """How the blocks of a network are written."""

    norm: str
    activation: str
    kernels: tuple[int, ...]
    preactivation: bool
    add: str
    reused: bool
    gate: bool
    nested: bool
    parallel: bool
    shortcut: str


class Gate(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.down, self.up = nn.Conv2d(n, 2, 1), nn.Conv2d(2, n, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inner(nn.Module):
    """A small residual inside a branch, as non-local attention has."""

    def __init__(self, n):
        super().__init__()
        self.a, self.b = nn.Conv2d(n, 2, 1), nn.Conv2d(2, n, 1)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.shape = shape
        widths = [inputs] + [outputs] * len(shape.kernels)
        strides = [1] * len(shape.kernels)
        strides[-2] = stride  # the first of two, the middle one of three: v1.5
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, s, k // 2, bias=False)
            for a, b, k, s in zip(widths, widths[1:], shape.kernels, strides, strict=False)
        )
        norm_widths = widths[:-1] if shape.preactivation else widths[1:]
        self.norms = nn.ModuleList(NORMS[shape.norm](n) for n in norm_widths)
        self.side = nn.Conv2d(outputs, outputs, 3, padding=1, groups=2) if shape.parallel else None
        self.gate = Gate(outputs) if shape.gate else nn.Identity()
        self.inner = Inner(outputs) if shape.nested else nn.Identity()
        self.act = ACTIVATIONS[shape.activation]()
        self.acts = nn.ModuleList(self.act if shape.reused else ACTIVATIONS[shape.activation]() for _ in shape.kernels)
        self.outputs, self.stride = outputs, stride
        changes = stride > 1 or inputs != outputs
        self.projection = nn.Conv2d(inputs, outputs, 1, stride) if changes and shape.shortcut == "conv" else None

    def shortcut(self, x):
        if self.projection is not None:
            return self.projection(x)
        if self.shape.shortcut == "pad" or self.shape.shortcut == "conv":
            x = x[:, :, :: self.stride, :: self.stride]
        else:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        return F.pad(x, (0, 0, 0, 0, 0, self.outputs - x.shape[1]))

    def forward(self, x):
        y = x
        last = len(self.convs) - 1
        for at, (conv, norm, act) in enumerate(zip(self.convs, self.norms, self.acts, strict=True)):
            if self.shape.preactivation:
                y = conv(act(norm(y) if self.shape.norm != "none" else y.clone()))
            else:
                y = norm(conv(y))
                y = y if at == last else act(y)
            if at == 0 and self.side is not None:
                y = torch.relu(y) + self.side(y)
        y = self.inner(self.gate(y))
        s = self.shortcut(x)
        if self.shape.add == "inplace":
            y += s
        elif self.shape.add == "method":
            y = y.add(s)
        elif self.shape.add == "scaled":
            y = 0.5 * y + s
        else:
            y = s + y
        return y if self.shape.preactivation else self.act(y)


class Network(nn.Module):
    def __init__(self, shape: Shape, widths: list[int], depths: list[int], container: str):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        stages, inputs = [], widths[0]
        for at, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for index in range(depth):
                blocks.append(Block(shape, inputs, width, 2 if at and not index else 1))
                inputs = width
            stages.append(nn.Sequential(*blocks) if container == "sequential" else nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.container = container
        self.head = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            if self.container == "sequential":
                x = stage(x)
            else:
                for block in stage:
                    x = block(x)
        return self.head(x.mean((2, 3)))


shapes = st.builds(
    Shape,
    norm=st.sampled_from(sorted(NORMS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    kernels=st.sampled_from([(3, 3), (1, 3, 1), (3, 1, 3), (1, 3, 3, 1)]),
    preactivation=st.booleans(),
    add=st.sampled_from(["plain", "inplace", "method", "scaled"]),
    reused=st.booleans(),
    gate=st.booleans(),
    nested=st.booleans(),
    parallel=st.booleans(),
    shortcut=st.sampled_from(["conv", "pad", "pool"]),
)
networks = st.tuples(
    shapes,
    st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=3).map(sorted),
    st.integers(1, 3),
    st.sampled_from(["sequential", "list"]),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks, st.sampled_from([(9, 13), (12, 8)]))
def test_random_residual_networks(network, size):
    shape, widths, depth, container = network
    torch.manual_seed(0)
    model = Network(shape, widths, [depth] * len(widths), container)
    expected = [f"stages.{s}.{b}" for s in range(len(widths)) for b in range(depth)]
    found = [site.block for site in survey(skeleton(model), RegulatorConfig(), sizes(model)).sites]
    assert [block.name for block in found] == expected
    count = len(shape.kernels)
    assert all(block.read.endswith("convs.1") for block in found)
    assert all(block.write.endswith(f"convs.{count - 1}") for block in found)
    perturb(model, [(torch.randn(6, 3, *size),) for _ in range(2)]).eval()
    try:
        regulated = regulate(model)
    except NoBlocksError:
        assert all(len(run) == 1 for run in runs_of_equal_width(widths, depth))
        return
    assert sum(map(len, runs_of_equal_width(widths, depth))) >= len(plan(model).blocks)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected_output = model(x)
        assert distance(expected_output, regulated(x)) < 1e-5
        if shape.norm != "batch":
            assert distance(model.train()(x), regulated.train()(x)) < 1e-5
        stir(regulated, 0.3).eval()
        assert distance(expected_output, regulated(x)) > 1e-4, "the memory does not reach the output"
    regulated.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in regulated.parameters())


def runs_of_equal_width(widths, depth):
    """The blocks of each stage; every stage but the first starts on a coarser grid."""
    return [[width] * depth for width in widths]
