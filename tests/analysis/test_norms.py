"""The norm of what is new is the block's own: its kind, and the numbers that it computes with."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from regulate import plan, regulate
from regulate.schema.plan import Plan

from ..helpers import small
from .odd_networks import Plain


def made(norm):
    class Own(Plain):
        def __init__(self):
            super().__init__()
            self.bn1, self.bn2 = norm(), norm()

    return small(Own(), Own())


@pytest.mark.parametrize("eps", [1e-3, 1e-6])
@pytest.mark.parametrize("momentum", [0.01, None])
def test_eps_and_momentum_of_a_batch_norm(eps, momentum):
    model = made(lambda: nn.BatchNorm2d(8, eps=eps, momentum=momentum))
    drawn = plan(model)
    for seen in (drawn, Plan.from_dict(json.loads(json.dumps(drawn.to_dict())))):
        assert [(b.norm.kind, b.norm.eps, b.norm.momentum) for b in seen.blocks] == [("batch", eps, momentum)] * 2
    for block in regulate(model)[1]:
        for norm in (block.regulator.hidden_norm, block.regulator.mix_norm):
            assert (norm.eps, norm.momentum) == (eps, momentum)


def test_momentum_none_is_the_mean_of_all_batches():
    norm = regulate(made(lambda: nn.BatchNorm2d(8, momentum=None)))[1][0].regulator.hidden_norm.train()
    for level in (1.0, 2.0, 6.0):
        norm(torch.full((2, 8, 3, 3), level))
    assert norm.running_mean.allclose(torch.tensor(3.0))


@pytest.mark.parametrize(("groups", "eps"), [(2, 1e-5), (4, 1e-3), (8, 1e-6)])
def test_groups_and_eps_of_a_group_norm(groups, eps):
    model = made(lambda: nn.GroupNorm(groups, 8, eps=eps))
    assert [(b.norm.kind, b.norm.groups, b.norm.eps) for b in plan(model).blocks] == [("group", groups, eps)] * 2
    for block in regulate(model)[1]:
        for norm in (block.regulator.hidden_norm, block.regulator.mix_norm):
            assert type(norm) is nn.GroupNorm and (norm.num_groups, norm.eps) == (groups, eps)


def test_a_norm_that_is_asked_for_has_the_eps_of_the_blocks_own():
    model = made(lambda: nn.BatchNorm2d(8, eps=1e-3))
    (norm,) = {block.norm for block in plan(model, norm="group").blocks}
    assert (norm.kind, norm.eps, norm.groups) == ("group", 1e-3, 32)
    assert regulate(model, norm="group")[1][0].regulator.hidden_norm.num_groups == 8


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_what_a_norm_does_not_say_is_torchs_default(kind):
    if not hasattr(nn, "RMSNorm"):
        pytest.skip("this torch has no RMSNorm")
    model = made(lambda: nn.Sequential(nn.Flatten(2), nn.RMSNorm(256), nn.Unflatten(2, (16, 16))))
    found = {
        (b.norm.kind, b.norm.eps, b.norm.momentum, b.norm.groups) for b in plan(model, norm=kind, input_size=16).blocks
    }
    assert found == {(kind, 1e-5, 0.1, 32)}
