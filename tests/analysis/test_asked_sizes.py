"""Code that asks tensors for sizes, types and numbers, or assigns to parts of them: a second trace knows them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import NoBlocksError, plan, regulate
from regulate.analysis.inputs import Inputs
from regulate.analysis.meta_copy import skeleton
from regulate.analysis.trace import trace
from regulate.models import cifar_resnet

from .odd_networks import Plain, X, assert_same, of, outputs


class Padded(nn.Module):
    """A 3x3 that pads for itself, as TensorFlow does."""

    def __init__(self, conv):
        super().__init__()
        self.conv = nn.Conv2d(conv.in_channels, conv.out_channels, 3)

    def forward(self, x):
        missing = [max((math.ceil(size / 1) - 1) + 3 - size, 0) for size in x.shape[-2:]]
        if any(missing):
            x = F.pad(x, [part for size in reversed(missing) for part in (size // 2, size - size // 2)])
        return self.conv(x)


class Checked(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        assert x.size(1) == self.conv.in_channels, f"{x.size(1)} channels"
        return self.conv(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, None


class Masked(Plain):
    """A map and, of a module that stays closed, a mask or none."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        y, mask = self.pair(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        assert len(x)
        return self.act(x + y if mask is None else x - y)


class Unasked(Masked):
    """The same without a question; a symbol is never None, and so the trace is made, but does not run."""

    def forward(self, x):
        y, mask = self.pair(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        y = y if mask is None else y * mask
        return self.act(x + y)


def around(wrapper):
    class Around(Plain):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = wrapper(self.conv1), wrapper(self.conv2)

    return Around


def late(function):
    """A block that does something to its branch's map and its input before it adds them."""

    class Late(Plain):
        def forward(self, x):
            y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
            return self.act(function(y, x))

    return Late


def middle(function):
    class Middle(Plain):
        def middle(self, y):
            return function(y)

    return Middle


def _starred(y, x):
    n, c, *grid = x.shape
    return x + y.reshape(n, c, *grid)


def _padded_channels(y, x):
    more = torch.zeros(x.size(0), y.size(1) - x.size(1) + 2, x.size(2), x.size(3))
    return torch.cat((x, more), 1)[:, : len(y[0])] + y


def _assigned(y, x):
    wide = x.new_zeros(y.shape)
    wide[:, : x.shape[1]] = x
    return wide + y


def _interleaved(y):
    z = torch.empty_like(y)
    z[:, ::2], z[:, 1::2] = y[:, 1::2], y[:, ::2]
    return z


def _turned(y):
    parts = y.chunk(2, 1)
    assert isinstance(parts, tuple)
    more = list(parts)
    more.extend(part for part in parts[:1])
    return torch.cat(more[1:], 1)


ASKING = {
    "an assertion on channels": around(Checked),
    "padding of its own": around(Padded),
    "a starred shape": late(_starred),
    "zeros as channels": late(_padded_channels),
    "a shortcut that is assigned": late(_assigned),
    "a type": late(lambda y, x: x + y if x.dtype == torch.float32 else x),
    "a device": late(lambda y, x: x + y if not x.is_cuda else x),
    "a number of axes": late(lambda y, x: x + y if x.dim() == len(x.shape) == x.ndim else x),
    "a grid that fits": late(lambda y, x: x + (y if y.shape == x.shape else F.interpolate(y, x.shape[2:]))),
    "a length": late(lambda y, x: x + y if len(x) else x),
    "a maximum": late(lambda y, x: x + F.pad(y, (0, max(0, 3 - x.shape[-1])))),
    "images one by one": middle(lambda y: torch.stack([image for image in y])),
    "assigned channels": middle(_interleaved),
    "a list of chunks": middle(_turned),
    "nothing": Masked,
    "nothing, without a word": Unasked,
    "a tensor of a tensor": late(lambda y, x: torch.as_tensor(x) + torch.as_tensor(y, dtype=torch.float64).float()),
    "a ramp": middle(lambda y: y * torch.linspace(1, 2, y.shape[-1]) + torch.arange(y.size(2))[:, None]),
}


# What made the map at their write point is not followed.
UNKNOWN = {ASKING[name] for name in ("images one by one", "assigned channels", "a ramp")}


@pytest.mark.parametrize("kind", ASKING.values(), ids=ASKING)
def test_code_that_asks_for_sizes_types_and_numbers(kind):
    model = of(kind)
    expected = "none" if kind in UNKNOWN else "relu"
    assert [block.activation for block in plan(model).blocks] == [expected] * 2
    assert_same(model, regulate(model, fusion="residual"))
    regulated = regulate(model)
    for x in (X, X[:1, :, :, :13], torch.rand(3, 3, 33, 35)):
        assert torch.equal(outputs(model, x=x), outputs(regulated, x=x))


@pytest.mark.parametrize("name", ["an assertion on channels", "padding of its own", "assigned channels"])
def test_with_example_inputs_as_well(name):
    model = of(ASKING[name])
    assert [block.name for block in plan(model, example_inputs=X).blocks] == ["1.0", "1.1"]


def test_it_is_as_good_as_code_that_does_not_ask():
    """The activation, the norm before it and a grid that is rounded down are known in both ways."""

    def network(kind):
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.MaxPool2d(2), nn.Sequential(kind(), kind()))

    class Asking(Plain):
        def forward(self, x):
            assert len(x)
            return super().forward(x)

    asked, plain = plan(network(Asking)), plan(network(Plain))
    assert asked.blocks == plain.blocks
    assert asked.blocks[0].activation == "relu"
    assert asked.blocks[0].sources[0].norm == "2.0.bn1"


class Strided(nn.Module):
    """A bottleneck whose stride lies between the points, in a pool that rounds down."""

    def __init__(self, asks):
        super().__init__()
        self.asks = asks
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        if self.asks:  # and so that the trace fits this size alone
            x = x.reshape(len(x), -1, *x.shape[2:])
        return self.pool(x) + self.conv3(self.pool(self.conv2(torch.relu(self.conv1(x)))))


def test_a_grid_that_rounds_down_at_another_size_is_seen():
    for asks in (False, True):
        block = plan(of(lambda: Strided(asks)), stages=(0,), input_size=32).blocks[0]  # noqa: B023, called at once
        assert (block.stride, block.crop) == ((2, 2), True)


class Sized(Plain):
    """Another activation and another order in small maps, and only the last map in single images."""

    def forward(self, x):
        if len(x) == 1:
            return x
        if x.shape[-1] < 20:
            return x + self.bn2(self.conv1(torch.tanh(self.bn1(self.conv2(x)))))
        return super().forward(x)


def test_another_way_at_another_size_is_the_same_function():
    model = of(Sized)
    regulated = regulate(model)
    for x in (torch.rand(2, 3, 32, 32), X, X[:1], torch.rand(2, 3, 97, 19)):
        assert torch.equal(outputs(model, x=x), outputs(regulated, x=x))


class InTraining(Plain):
    def middle(self, y):
        images = len(y)
        return -y if self.training and images > 1 else y


def test_another_activation_in_train_mode_is_seen():
    assert {block.activation for block in plan(of(InTraining)).blocks} == {"none"}


def test_the_reason_names_the_size_and_what_to_give():
    class Fixed(Plain):
        def forward(self, x):
            assert x.shape[-1] == 24, "24 pixels"
            return super().forward(x)

    class Network(nn.Sequential):
        def forward(self, x):
            assert x.shape[2:] == (24, 24), "made for 24 pixels"
            return super().forward(x)

    model = Network(*of(Fixed))
    with pytest.raises(NoBlocksError, match=r"on an image of 3x224x224: made for 24 pixels.*give input_size= or"):
        plan(model)
    assert len(plan(model, input_size=24).blocks) == 2


def test_the_size_is_the_one_that_was_traced():
    class Network(nn.Sequential):
        img_size = 32  # which is tried first

        def forward(self, x):
            assert x.shape[-1] == 224
            return super().forward(x)

    assert plan(Network(*of(Plain))).input_size == (3, 224, 224)


def test_a_network_that_does_not_ask_is_traced_once():
    bare = skeleton(cifar_resnet(8))
    assert not trace(bare).sized
    sized = trace(bare, Inputs((torch.empty(2, 3, 32, 32, device="meta"),), {}), sized=True)
    assert [node.target for node in sized.graph.nodes] == [node.target for node in trace(bare).graph.nodes]


def test_a_plan_leaves_weights_and_statistics_alone():
    model = of(ASKING["an assertion on channels"])
    before = copy.deepcopy(model.state_dict())
    plan(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_a_part_with_a_single_block_is_not_advised():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Sequential(Plain()), nn.Sequential(Plain(), Plain())

        def forward(self, x):
            x = self.two(self.one(self.stem(x)))
            return x * x.mean().item()

    with pytest.raises(NoBlocksError, match=r"its part two can be regulated alone: model\.two = regulate"):
        plan(Network())
