"""The finder's rules one by one, where a whole network would hide that one of them is missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from regulate import plan
from regulate.cli import load_model
from regulate.config import RegulatorConfig
from regulate.skeleton import skeleton
from regulate.survey import survey
from regulate.trace import trace


def seen(model):
    found = survey(skeleton(model), RegulatorConfig(), (64, 64))
    return [site.block.name for site in found.sites], [entry.name for entry in found.skipped]


def test_parallel_convolutions_are_no_branch():
    assert seen(load_model("repvgg_a0")) == ([], [])


class Hourglass(nn.Module):
    """Two convolutions beside a shortcut, but on a coarser grid, enlarged before the addition."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = self.conv2(torch.relu(self.conv1(F.max_pool2d(x, 2))))
        return x + F.interpolate(y, scale_factor=2.0)


def test_a_branch_that_upsamples_is_no_residual_branch():
    assert seen(nn.Sequential(nn.Conv2d(3, 8, 1), Hourglass(), Hourglass())) == ([], [])


def test_a_chain_ends_where_parallel_branches_meet():
    drawn = plan(load_model("hrnet_w18_small"))
    assert drawn.stages[0].name == "stage2.0.branches.0"
    assert {"layer1", "incre_modules.0"} <= {entry.name for entry in drawn.skipped}


class Stubborn(nn.Module):
    """Cannot be traced, but only after it has left nodes behind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else x


def test_a_module_that_cannot_be_opened_leaves_nothing_behind():
    traced = trace(skeleton(nn.Sequential(nn.Conv2d(3, 3, 1), Stubborn())))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert list(traced.closed) == ["1"]
