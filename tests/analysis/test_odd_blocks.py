"""Blocks that go over their own parts, run a point twice, or hold something else than its class says."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regulate import NoBlocksError, plan, regulate, unregulate
from regulate.rewrite.lookup import regulated_blocks

from ..helpers import small
from .odd_networks import Listed, Plain, assert_same, of, outputs


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Indexed(nn.Sequential):
    def forward(self, x):
        y = x
        for layer in self[:-1]:
            y = layer(y)
        return x + self[-1](y) / len(self)


@pytest.mark.parametrize("kind", [Residual, Indexed])
def test_a_block_that_is_a_sequential_does_not_run_its_regulator(kind):
    def block():
        return kind(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    model = of(block)
    regulated = regulate(model, fusion="residual")
    assert len(list(regulated_blocks(regulated))) == 2
    assert_same(model, regulated)
    first = regulated[1][0]
    assert len(first) == 4
    assert [type(layer) for layer in first] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, type(first[3])]
    assert first[-1] is first[3]
    assert "1.0.regulator.mix.weight" in regulated.state_dict()
    assert_same(model, pickle.loads(pickle.dumps(regulated)))
    assert type(unregulate(regulated)[1][0]) is kind


class OverChildren(Plain):
    def forward(self, x):
        y = x
        for child in self.children():
            y = child(y)
        return x + y


class Penalised(Plain):
    def forward(self, x):
        return super().forward(x) + sum(p.mean() for p in self.parameters())


class Counted(Plain):
    def forward(self, x):
        return super().forward(x) / sum(isinstance(m, nn.Conv2d) for m in self.modules())


class OnlyInTraining(Plain):
    def forward(self, x):
        y = super().forward(x)
        return y + sum(p.mean() for p in self.parameters()) if self.training else y


class OverBuffers(Plain):
    def forward(self, x):
        return super().forward(x) + sum(b.float().mean() for b in self.buffers())


class Keyed(Listed):
    def forward(self, x):
        return super().forward(x) * len(self.state_dict())


@pytest.mark.parametrize("make", [
    lambda: of(OverChildren), lambda: of(Penalised), lambda: of(Counted), lambda: of(OnlyInTraining),
    lambda: of(OverBuffers), Keyed,
])  # fmt: skip
def test_code_that_would_take_a_regulator_for_a_part_of_its_own_is_refused(make):
    with pytest.raises(NoBlocksError, match="goes over submodules, parameters or the state dict"):
        regulate(make())


CONSTANTS = {
    "computed": lambda n: torch.ones(1) / n,
    "of one call": lambda n: torch.full((1,), 1 / n),
    "of a number": lambda n: torch.tensor(1 / n),
    "of numpy": lambda n: torch.from_numpy(np.ones(1, dtype=np.float32) / n),
    "long": lambda n: (torch.arange(8) < n).float()[:, None, None],
}


@pytest.mark.parametrize("make", CONSTANTS.values(), ids=CONSTANTS)
def test_so_is_code_that_puts_what_it_found_into_a_constant(make):
    class Scaled(Plain):
        def middle(self, y):
            return y * make(len(list(self.children())))

    with pytest.raises(NoBlocksError, match="goes over submodules"):
        regulate(of(Scaled))


def test_so_is_code_that_puts_what_it_found_into_a_keyword():
    class Added(Plain):
        def forward(self, x):
            return torch.add(x, self.bn2(self.conv2(self.act(self.conv1(x)))), alpha=1 / len(list(self.children())))

    with pytest.raises(NoBlocksError, match="goes over submodules"):
        regulate(of(Added))


def test_no_part_is_advised_where_the_whole_would_take_a_regulator_for_its_own():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Plain(), Plain())

        def forward(self, x):
            n = len(list(self.modules()))
            return self.layer(self.stem(x)) * n

    with pytest.raises(NoBlocksError, match="goes over submodules") as caught:
        regulate(Whole())
    assert "can be regulated alone" not in str(caught.value)


def test_a_block_that_runs_its_points_twice_in_training_is_refused():
    class Twice(Plain):
        def middle(self, y):
            return self.conv2(y) * 0 + y if self.training else y

    with pytest.raises(NoBlocksError, match=r"in train mode it calls 1\.0\.conv2 2 times"):
        regulate(of(Twice))


class NormOfActivated(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(x))


class NegativeDropout(nn.Dropout):
    def forward(self, x):
        return -super().forward(x)


class NegativeGate(nn.Sigmoid):
    def forward(self, x):
        return super().forward(x) - 1


@pytest.mark.parametrize(
    "part", [NormOfActivated(8), NegativeDropout(), NegativeGate()], ids=lambda p: type(p).__name__
)
def test_no_activation_behind_a_subclass_of_something_known(part):
    class Odd(Plain):
        def __init__(self):
            super().__init__()
            self.part = copy.deepcopy(part)

        def middle(self, y):
            return y * self.part(y) if isinstance(part, nn.Sigmoid) else self.part(y)

    model = of(Odd)
    assert {block.activation for block in plan(model).blocks} == {"none"}
    assert torch.allclose(outputs(regulate(model)), outputs(model), rtol=1e-4, atol=1e-5)


def test_no_activation_behind_a_patched_class(monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: -F.relu(x))
    model = of(Plain)
    assert {block.activation for block in plan(model).blocks} == {"none"}
    assert torch.allclose(outputs(regulate(model)), outputs(model), rtol=1e-4, atol=1e-5)


class RootMeanSquare(nn.Module):
    """A block with torch's RMSNorm, whose default for eps is None."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x).movedim(1, -1)).movedim(-1, 1))
        return x + self.norm2(self.conv2(y).movedim(1, -1)).movedim(-1, 1)


def test_a_norm_without_an_eps_of_its_own():
    model = small(RootMeanSquare(), RootMeanSquare()).eval()
    assert [block.norm.eps for block in plan(model).blocks] == [1e-5, 1e-5]
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(regulate(model)(x), model(x))
