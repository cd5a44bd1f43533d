"""Blocks, and modules at their points, that are a torch.fx.GraphModule: each has a class of its own, with its code."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from regulate import disabled, regulate, unregulate
from regulate.testing import perturb

from ..helpers import Block, stir

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def network(wrap):
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    model = perturb(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks), [(X,), (X.flip(0),)]).eval()
    return wrap(model)


def graphs(model):
    for at, block in enumerate(model[1]):
        model[1][at] = fx.symbolic_trace(block)
    return model


def a_point_later(model):
    """Of a regulated network."""
    model[1][1].conv2 = fx.symbolic_trace(model[1][1].conv2)
    return model


def outputs(*models):
    with torch.no_grad():
        return [model(X) for model in models]


def regulated_twin(kind):
    model = network(graphs if kind == "blocks" else lambda model: model)
    regulated = stir(regulate(model)).eval()
    if kind == "a point":
        a_point_later(regulated)
    outputs(regulated)
    return model, regulated


@pytest.mark.parametrize("kind", ["blocks", "a point"])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_regulated_networks_of_their_own(kind, again):
    model, regulated = regulated_twin(kind)
    other = again(regulated)
    assert torch.equal(*outputs(other, regulated))
    assert not torch.allclose(*outputs(other, model), rtol=1e-2)
    with disabled(other):
        assert not torch.allclose(*outputs(other, regulated), rtol=1e-2)
    unregulate(other)
    assert torch.equal(*outputs(other, model))
    assert not torch.allclose(*outputs(other, regulated), rtol=1e-2)


def test_the_graph_of_a_block_can_be_edited():
    model, regulated = regulated_twin("blocks")
    for either in (model, regulated):
        for block in either[1]:
            (added,) = (node for node in block.graph.nodes if node.op == "call_function")
            with block.graph.inserting_after(added):
                twice = block.graph.call_function(torch.mul, (added, 2.0))
            added.replace_all_uses_with(twice)
            twice.args = (added, 2.0)
            block.recompile()
    assert not torch.allclose(*outputs(regulated, model), rtol=1e-2)
    with disabled(regulated):
        assert torch.equal(*outputs(regulated, model))
    assert torch.equal(*outputs(unregulate(regulated), model))
