"""Code that a trace has to get over: what fails and is caught, what is kept between calls, what stands in no module."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from regulate import BlockCallError, NoBlocksError, plan, regulate

from .odd_networks import Listed, Plain, X, assert_same, of, outputs


class Asking(Plain):
    """Is traced with sizes at hand."""

    def forward(self, x):
        assert x.shape[1] == 8
        return super().forward(x)


class Door(nn.Module):
    """Does something else with a map that lies in memory otherwise, as the fused one does."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x) if x.is_contiguous() else self.conv(x) * 0.5


class Laid(Plain):
    def __init__(self):
        super().__init__()
        self.conv2 = Door(self.conv2)

    def middle(self, y):
        return y.transpose(2, 3).contiguous().transpose(2, 3)


def test_code_around_a_convolution_sees_the_map_that_came():
    model = of(Laid)
    assert plan(model).blocks[0].write == "1.0.conv2.conv"
    assert torch.equal(outputs(model), outputs(regulate(model)))


@pytest.mark.parametrize(
    "made",
    [
        lambda y: torch.Tensor(*y.shape).zero_(),
        lambda y: torch.empty(8, 1, 1).fill_(0.5),
        lambda y: torch.empty(8, 1, 1).zero_() + 1,
    ],
)
def test_memory_that_was_never_filled_tells_nothing(made):
    class Added(Asking):
        def middle(self, y):
            return y + made(y)

    model = of(Added, blocks=6)
    for _ in range(3):
        torch.rand(2, 8, 224, 224)  # whose memory is free again
        assert len(plan(model).blocks) == 6


CACHE = {}


def helper(grid):
    if grid not in CACHE:
        CACHE[grid] = torch.ones(grid)
    return CACHE[grid]


def default(grid, cache={}):  # noqa: B006, which is the point
    if grid not in cache:
        cache[grid] = torch.ones(grid)
    return cache[grid]


@functools.lru_cache
def cached(grid):
    return torch.ones(grid)


class Kept:
    """An object of another class, which is not looked into: its keys name the device."""

    def __init__(self):
        self.ones = {}

    def __call__(self, grid, device):
        return self.ones.setdefault((grid, device), torch.ones(grid, device=device))


KEPT = Kept()


class Bias(nn.Module):
    def __init__(self, ones):
        super().__init__()
        self.ones = ones

    def forward(self, x):
        if self.ones == 3:
            return x + KEPT(tuple(x.shape[2:]), x.device)
        return x + (helper if self.ones == 0 else default if self.ones == 1 else cached)(tuple(x.shape[2:]))


PLACES = ["what a function names", "a default", "a cache of a function", "an object whose keys name the device"]


@pytest.mark.parametrize("where", range(4), ids=PLACES)
def test_what_is_kept_between_calls_holds_no_weightless_tensor(where):
    class Biased(Asking):
        def __init__(self):
            super().__init__()
            self.bias = Bias(where)

        def middle(self, y):
            return self.bias(y)

    model = of(Biased)
    assert len(plan(model, input_size=16).blocks) == 2
    outputs(model)


class Written(nn.Module):
    """Writes to the map that it gets, and then cannot be opened."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x[:, 0] = 0
        return torch.vmap(torch.abs)(self.conv(x))


def test_an_assignment_in_a_module_that_stays_closed_is_none():
    model = nn.Sequential(*of(Plain), Written())
    assert len(plan(model).blocks) == 2
    assert torch.equal(outputs(model), outputs(regulate(model)))


class Tried(Asking):
    def middle(self, y):
        try:
            return y.view(len(y), 3, -1).view_as(y)
        except RuntimeError:
            return y


class Filling(nn.Module):
    def forward(self, x):
        return x + torch.zeros(x.shape)


class Filled(Asking):
    def __init__(self):
        super().__init__()
        self.filling = Filling()

    def middle(self, y):
        return self.filling(y)


class Cut(Plain):
    """Runs a part of a container, which torch cuts out as one of its own."""

    def __init__(self):
        super().__init__()
        self.out = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return x + self.out[1:](self.out[0](self.conv1(x)))


class Union(Asking):
    def middle(self, y):
        return y if isinstance(y, torch.Tensor | list) else -y


@pytest.mark.parametrize("kind", [Tried, Filled, Cut, Union])
def test_code_that_is_followed(kind):
    model = of(kind)
    assert [block.activation for block in plan(model).blocks] == ["none" if kind is Filled else "relu"] * 2
    assert_same(model, regulate(model, fusion="residual"))
    assert torch.equal(outputs(model), outputs(regulate(model)))


class Sliced(Plain):
    """Adds its input to the first channels, as many as there are."""

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y[:, : x.size(1)] += x
        return self.act(y)


def test_blocks_follow_each_other_through_an_assignment():
    model = of(Sliced, blocks=3)
    assert len(plan(model).stages) == 1
    assert len(plan(model).blocks) == 3
    assert torch.equal(outputs(model, x=X), outputs(regulate(model), x=X))


class Twice(Asking):
    """Runs its second convolution once more in small maps, which a plan at 224 pixels does not see."""

    def middle(self, y):
        return self.act(self.conv2(y)) if y.shape[-1] < 20 else y


def test_a_write_point_that_is_passed_twice_at_another_size_is_an_error():
    model = of(Twice)
    regulated = regulate(model)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(outputs(model, x=x), outputs(regulated, x=x))
    with pytest.raises(BlockCallError, match="twice in one forward pass"):
        outputs(regulated)


def test_the_reason_is_of_what_is_left_when_sizes_are_at_hand():
    class Mapped(Asking):
        def middle(self, y):
            return torch.vmap(torch.abs)(y)

    with pytest.raises(NoBlocksError, match=r"blocks\.0: cannot be opened: _add_batch_dim"):
        plan(Listed(Mapped))
