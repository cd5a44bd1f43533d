"""Blocks whose maps have a border at one point and none at the other: padding that is not the convolution's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import NoBlocksError, plan, regulate

from .odd_networks import X, assert_same, of, outputs


class Bottleneck(nn.Module):
    """Its 3x3 pads by itself."""

    def __init__(self, kernel, outside):
        super().__init__()
        self.border, self.outside = kernel // 2, outside
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, kernel, padding=0 if outside else kernel // 2), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        if self.outside:
            y = F.pad(y, (self.border,) * 4)
        return x + self.conv3(torch.relu(self.bn2(self.conv2(y))))


class Cropped(nn.Module):
    """Its 3x3 does not pad, and the shortcut is cut to what is left."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return F.pad(x, (-1,) * 4) + y


class Strided(nn.Module):
    """It pads in front of a 5x5 with stride 2, and has a shortcut that keeps to the stride."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, 2), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv2(F.pad(torch.relu(self.conv1(x)), (2,) * 4))
        return x[..., ::2, ::2] + self.conv3(torch.relu(y))


def shaken(model):
    """Regulated, with a memory that says something."""
    regulated = regulate(model, seed=0)
    with torch.no_grad():
        for name, parameter in regulated.named_parameters():
            if "regulat" in name and parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) / 4)
    return regulated


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_memory_reads_what_is_inside_of_the_border(kernel):
    outside, inside = (of(lambda: Bottleneck(kernel, outside), 3) for outside in (True, False))  # noqa: B023, at once
    inside.load_state_dict(outside.state_dict())
    assert [(b.stride, b.crop) for b in plan(outside, input_size=16).blocks] == [((1, 1), True)] * 3
    assert torch.equal(outputs(outside), outputs(regulate(outside)))
    assert_same(outside, regulate(outside, fusion="residual"))
    pair = [shaken(model) for model in (outside, inside)]
    for x in (X, torch.rand(2, 3, 33, 20)):
        a, b = (outputs(model, x=x) for model in pair)
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a, outputs(outside, x=x), rtol=1e-2)


def test_a_border_as_wide_as_the_map_is_no_stride():
    # 7 and 13 pixels: as many as a stride of 2 would leave, but not at another size.
    block = plan(of(lambda: Bottleneck(7, True)), input_size=7).blocks[0]
    assert (block.stride, block.crop) == ((1, 1), True)


def test_blocks_that_do_not_pad():
    model = of(Cropped, 3)
    # Each block has a grid of its own, and so each is a stage.
    regulated = regulate(model, stages=[0, 1, 2])
    assert_same(model, regulated)


def test_a_border_and_a_stride():
    model = of(Strided)
    drawn = plan(model, stages=[0, 1], input_size=32)
    assert [(b.stride, b.crop) for b in drawn.blocks] == [((2, 2), True)] * 2
    assert_same(model, regulate(model, stages=[0, 1]))


def test_a_stride_is_seen_where_one_size_alone_is_known():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = of(Strided, 1)

        def forward(self, x, t):
            return self.net(x) * t

    drawn = plan(Two(), stages=[0], example_inputs=(X, torch.ones(2, 1, 1, 1)))
    assert [(b.stride, b.crop) for b in drawn.blocks] == [((2, 2), True)]


def test_a_grid_that_grows_is_no_border():
    class Grown(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=2), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return F.pad(x, (1,) * 4) + self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))

    with pytest.raises(NoBlocksError, match=r"\(16, 16\) and \(18, 18\), differ by more than a stride"):
        plan(of(Grown, 1), stages=[0], input_size=16)


def test_a_grid_of_one_size_for_all_images_is_no_border():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

        def forward(self, x):
            y = self.convs[1](torch.relu(self.convs[0](x)))
            return F.adaptive_avg_pool2d(x, 7) + self.convs[2](F.adaptive_avg_pool2d(torch.relu(y), 7))

    with pytest.raises(NoBlocksError, match=r"\(56, 56\) and \(7, 7\), differ by more than a stride"):
        plan(of(Fixed, 1), stages=[0], input_size=56)


def test_the_copy_of_a_bordered_network_is_itself():
    model = shaken(of(lambda: Bottleneck(3, True)))
    assert torch.equal(outputs(model), outputs(copy.deepcopy(model)))
