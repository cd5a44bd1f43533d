"""The numbers of `regulate.inspect` against their definitions, on values made by hand."""

from __future__ import annotations

import pytest
import torch

from regulate import regulate
from regulate.inspect import Step, gate_statistics, hidden_norm, record

from ..helpers import small, stir

NONE = torch.empty(0)


def step(**values):
    return Step("a", NONE, values.pop("hidden", NONE), NONE, values, 0.0)


def of(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


@pytest.mark.parametrize("name", ["i", "f", "o", "r", "z"])
def test_a_gate_from_zero_to_one_is_saturated_by_a_twentieth(name):
    found = gate_statistics(step(**{name: of(0.01, 0.04, 0.06, 0.4, 0.6, 0.94, 0.96, 0.99)}))[name]
    assert found.saturated == 4 / 8
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(0.4327, abs=1e-4)


@pytest.mark.parametrize("name", ["g", "n"])
def test_a_gate_from_minus_one_to_one_is_saturated_by_a_tenth(name):
    found = gate_statistics(step(**{name: of(-0.99, -0.91, -0.89, 0.01, 0.04, 0.89, 0.91, 0.96)}))
    assert found[name].saturated == 4 / 8


def test_the_norm_of_a_hidden_state_is_a_mean_over_images():
    hidden = torch.stack([torch.full((2, 3, 3), 1.0), torch.full((2, 3, 3), -2.0)])
    assert hidden_norm(step(hidden=hidden)) == pytest.approx(1.5 * 18**0.5)


def test_the_share_of_a_hidden_state_is_that_of_its_half_of_the_product():
    model = stir(regulate(small())).eval()
    maps = []
    for block in model[1]:
        block.regulator.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    steps = record(model, torch.randn(2, 3, 8, 8))["1.0"]
    assert len(maps) == len(steps) == 2
    for one, x, block in zip(steps, maps, model[1], strict=True):
        own, memory = block.regulator.mix.weight.chunk(2, 1)
        a, b = (torch.nn.functional.conv2d(*pair).norm().item() for pair in ((x, own), (one.hidden, memory)))
        assert one.share == pytest.approx(b / (a + b), rel=1e-4)
        assert 0.01 < one.share < 0.99
