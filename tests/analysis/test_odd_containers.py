"""Containers whose own code chooses which blocks run, and in what order: the memory follows the blocks that ran."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from regulate import regulate
from regulate.rewrite.lookup import regulated_blocks

from ..helpers import stir
from .odd_networks import Listed, X, assert_same


class Dropping(Listed):
    def chosen(self):
        return [b for b in self.blocks if not (self.training and random.random() < 0.5)]


class Shuffling(Listed):
    def chosen(self):
        return random.sample(list(self.blocks), 3) if self.training else self.blocks


class FromSecond(Listed):
    start = 0

    def chosen(self):
        return self.blocks[self.start :]


class Recovering(Listed):
    fails = -1

    def forward(self, x):
        x = self.stem(x)
        for at, block in enumerate(self.blocks):
            try:
                x = block(x if at != self.fails else x[:, :1])
            except RuntimeError:
                continue
        return x


@pytest.mark.parametrize("kind", [Dropping, Shuffling])
def test_which_blocks_run_is_up_to_the_container(kind):
    model = kind()
    regulated = regulate(model, fusion="residual")
    assert len(list(regulated_blocks(regulated))) == 3
    assert_same(model, regulated, range(8))
    # Memory is passed on from the block before, whichever that was: gradients reach the cell.
    stir(regulated).train()
    random.seed(3)
    regulated(X).sum().backward()
    assert regulated.blocks[0].regulator.cell.gates.weight.grad.any()


@pytest.mark.parametrize(("kind", "attribute", "value"), [(FromSecond, "start", 1), (Recovering, "fails", 1)])
def test_blocks_that_are_left_out_later(kind, attribute, value):
    model = kind()
    regulated = regulate(model, fusion="residual")
    for either in (model, regulated):
        setattr(either, attribute, value)
    assert_same(model, regulated)


def test_checkpointed_blocks_behind_one_that_is_left_out_have_the_same_gradients():
    class Checkpointed(FromSecond):
        checkpointed = False

        def forward(self, x):
            x = self.stem(x)
            for block in self.chosen():
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            return x

    model = stir(regulate(Checkpointed(), fusion="residual")).train()
    model.start = 1
    plainly = copy.deepcopy(model)
    model.checkpointed = True
    for either in (model, plainly):
        either(X).square().sum().backward()
    assert model.blocks[0].regulator.cell.gates.weight.grad.any()
    for (name, a), (_, b) in zip(model.named_parameters(), plainly.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3), name
