"""The finder's rules one by one, where a whole network would hide that one of them is missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from regulate import plan, regulate
from regulate.analysis.candidates import survey
from regulate.analysis.inputs import Size
from regulate.analysis.meta_copy import skeleton
from regulate.analysis.trace import trace
from regulate.config import RegulatorConfig
from regulate.models.by_name import load_model


def seen(model):
    found = survey(skeleton(model), RegulatorConfig(), [Size((64, 64))])
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


class TwoPaths(nn.Module):
    """A dual path block as older versions of timm write it: the two paths travel as a tuple."""

    def __init__(self, dense):
        super().__init__()
        self.conv1 = nn.Conv2d(8 + dense, 8, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.grow = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        whole = torch.cat(x, 1) if isinstance(x, tuple) else x
        residual, dense = x if isinstance(x, tuple) else (x[:, :8], x[:, 8:])
        y = torch.relu(self.norm(self.conv2(torch.relu(self.conv1(whole)))))
        return residual + self.conv3(y), torch.cat([dense, self.grow(y)], 1)


class Joined(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1)


def two_paths():
    blocks = [TwoPaths(4 + 4 * i) for i in range(6)]
    blocks[3].conv1 = nn.Conv2d(24, 16, 1)
    blocks[3].conv2 = nn.Conv2d(16, 8, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.Sequential(*blocks), Joined()).eval()


def test_blocks_whose_paths_travel_apart():
    assert seen(two_paths()) == ([f"1.{i}" for i in range(6)], [])


def test_a_stage_behind_blocks_that_return_tuples():
    model, x = two_paths(), torch.randn(2, 3, 20, 20)
    assert [len(stage.blocks) for stage in plan(model).stages] == [3, 2]
    with torch.no_grad():
        for stages in ([0], [2], None):
            assert torch.equal(regulate(model, stages=stages)(x), model(x))
