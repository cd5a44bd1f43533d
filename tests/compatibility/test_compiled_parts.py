"""torch.compile where it does not see all: graph breaks, and what the library itself runs of a compiled network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regulate import calibrate, disabled, regulate
from regulate.inspect import record, similarity
from regulate.models.cifar import CifarBlock

from ..helpers import network, small, small_block, stirred

pytestmark = pytest.mark.slow

X = torch.randn(2, 3, 16, 16)


class Broken(CifarBlock):
    def forward(self, x):
        torch._dynamo.graph_break()
        y = self.relu(self.bn1(self.conv1(x)))
        torch._dynamo.graph_break()
        y = self.bn2(self.conv2(y))
        torch._dynamo.graph_break()
        return torch.relu(x + y)


class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(CifarBlock(3, 3, 1, "B", 0) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def hooked():
    """A hook whose answer the compiler cannot know."""
    model = small(small_block(), small_block(), small_block())
    for block in model[1]:
        block.register_forward_hook(lambda module, args, out: out + out.mean().item())
    return model


NETWORKS = {
    "in blocks": lambda: small(*(Broken(8, 8, 1, "B", 0) for _ in range(3))),
    "between blocks": Between,
    "in hooks": hooked,
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("build", NETWORKS)
def test_graph_breaks_do_not_lose_the_memory(build, trained):
    model = stirred(NETWORKS[build]()).train(trained)
    expected, found = copy.deepcopy(model)(X), torch.compile(model, backend="eager")(X)
    assert torch.allclose(found, expected, atol=1e-5)
    with disabled(model):
        assert not torch.allclose(model(X), expected, atol=1e-2)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def by_wrapper(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def one_stage(model):
    model.layer1.compile(backend="eager")
    return model


WAYS = [by_wrapper, in_place, one_stage]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_can_be_looked_into(way):
    model = stirred(network("cifar/14"))
    expected, shares = similarity(model, X), [[s.share for s in line] for line in record(model, X).values()]
    model = way(model)
    with torch.no_grad():
        model(X)
        assert similarity(model, X) == expected
        assert [[step.share for step in line] for line in record(model, X).values()] == shares


@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_can_be_calibrated(way):
    model = regulate(network("cifar/14"))
    expected = calibrate(copy.deepcopy(model), [X]).state_dict()
    model = way(model)
    with torch.no_grad():
        model(X)
    calibrate(model, [X])
    assert all(map(torch.equal, model.state_dict().values(), expected.values()))
