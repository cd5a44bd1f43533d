"""Blocks whose own forward checkpoints some of its layers, as mmdetection's do with `with_cp`."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from regulate import BlockCallError, disabled, kernels, regulate
from regulate.rewrite import inside
from regulate.rewrite.lookup import regulated_blocks

from ..helpers import stir

# What of a block is checkpointed; None is nothing.
WAYS = ["all", "branch", "before the write point", "from read to write", "behind the write point", "layer by layer"]


class Block(nn.Module):
    """A bottleneck: it is read at its second convolution, and written at its third."""

    def __init__(self, way=None, reentrant=False, width=8):
        super().__init__()
        self.way, self.reentrant = way, reentrant
        self.conv1 = nn.Conv2d(width, 6, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def first(self, x):
        return torch.relu(self.norm1(self.conv1(x)))

    def second(self, x):
        return torch.relu(self.norm2(self.conv2(x)))

    def third(self, x):
        return self.norm3(self.conv3(x))

    def before(self, x):
        x = self.run(self.first, x, "layer by layer")
        return self.run(self.second, x, "layer by layer", "from read to write")

    def branch(self, x):
        x = self.run(self.before, x, "before the write point")
        return self.run(self.third, x, "behind the write point", "layer by layer")

    def whole(self, x):
        return torch.relu(x + self.run(self.branch, x, "branch"))

    def run(self, part, x, *ways):
        if self.way in ways and self.training:
            return checkpoint(part, x, use_reentrant=self.reentrant)
        return part(x)

    def forward(self, x):
        return self.run(self.whole, x, "all")


def trunk(cell="lstm"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*(Block() for _ in range(3))))
    return stir(regulate(model, cell, input_size=(16, 16))).double().train()


def switched(model, way, reentrant=False):
    model = copy.deepcopy(model)
    for block in model[1]:
        block.way, block.reentrant = way, reentrant
    return model


def images(seed=0):
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()


def trained(model, run=lambda model, x: model(x)):
    x = images()
    run(model, x).square().mean().backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def alike(a, b):
    return all(torch.allclose(a[name], b[name], rtol=1e-6, atol=1e-9) for name in a)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.use("torch", "torch.utils.checkpoint inside of blocks, non-reentrant")
def test_gradients_are_those_without_checkpoints(cell, way):
    model = trunk(cell)
    expected = trained(switched(model, None))
    assert alike(trained(switched(model, way)), expected)
    with set_checkpoint_early_stop(False):
        assert alike(trained(switched(model, way)), expected)
    # Written out, autograd saves no more than what the inputs that need gradients take.
    with kernels.use("reference"):
        assert alike(trained(switched(model, way)), expected)


@pytest.mark.parametrize("way", WAYS)
def test_two_backward_passes_through_one_graph(way):
    grads = []
    for model in (switched(trunk(), None), switched(trunk(), way)):
        x = images()
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
    assert alike(*grads)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_are_checkpointed_as_well(way):
    model = trunk()

    def by_block(model, x):
        x = model[0](x)
        for block in model[1]:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    assert alike(trained(switched(model, way), by_block), trained(switched(model, None)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_passes_that_take_turns(way, order):
    """Each backward pass runs again with the state of its own forward pass."""
    model = trunk()
    found = []
    for one in (switched(model, way), switched(model, None)):
        xs = [images(seed) for seed in (3, 4)]
        outs = [one(x).square().mean() for x in xs]
        for at in order:
            outs[at].backward()
        found.append({"0": xs[0].grad, "1": xs[1].grad, **{name: p.grad for name, p in one.named_parameters()}})
    assert alike(*found)


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_that_is_switched_off_is_run_again_without_regulators(way):
    model = trunk()

    def off(model, x):
        with disabled(model):
            return model(x)

    plain, checkpointed = switched(model, None), switched(model, way)
    found = []
    for one in (plain, checkpointed):
        x = images()
        off(one, x).square().mean().backward()
        found.append({"x": x.grad, **{n: p.grad for n, p in one.named_parameters() if p.grad is not None}})
    assert found[0].keys() == found[1].keys()
    assert alike(*found)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_ends_with_the_graph(way):
    model = switched(trunk(), way)
    out = model(images())
    kept = len(inside._alive)
    assert kept == (0 if way in ("before the write point", "from read to write") else 3)
    assert all((one.read is None) == (way in ("all", "branch")) for one in inside._alive), "made again, not kept"
    out.square().mean().backward(retain_graph=True)
    assert all(one.again is None for one in inside._alive), "it would hold what the second run saved"
    del out
    gc.collect()
    assert not len(inside._alive)


def test_nothing_is_kept_without_checkpoints():
    out = switched(trunk(), None)(images())
    assert out.requires_grad
    assert not len(inside._alive)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "from read to write"])
def test_the_reentrant_form_loses_the_gradient_of_the_memory_and_says_so(way):
    with pytest.raises(BlockCallError, match=r"around its (read|write) point.*use_reentrant=False"):
        trained(switched(trunk(), way, reentrant=True))


def test_the_reentrant_form_works_where_the_memory_stays_outside():
    model = trunk()
    assert alike(trained(switched(model, "from read to write", reentrant=True)), trained(switched(model, None)))


class Always(Block):
    def run(self, part, x, *ways):
        return checkpoint(part, x, use_reentrant=False) if self.way in ways else part(x)


def test_blocks_that_are_planned_with_checkpoints_on():
    blocks = [Block("all") for _ in range(3)], [Always("branch") for _ in range(3)]
    models = [nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*each)).train() for each in blocks]
    for model in models:
        regulated = regulate(model, input_size=(16, 16)).double()
        assert len(list(regulated_blocks(regulated))) == 3
        assert alike(trained(regulated), trained(switched(regulated, None)))
