"""Random numbers of a user's own go on as if no network had been planned."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from regulate import plan
from regulate.utils.modes import fixed_random_state

from .odd_networks import Plain, of

GENERATORS = {
    "python": (random.random, random.seed),
    "numpy": (np.random.rand, np.random.seed),
    "torch": (lambda: torch.rand(()).item(), torch.manual_seed),
}


class Drawing(Plain):
    def middle(self, y):
        for draw, _ in GENERATORS.values():
            y = y + draw()
        return y


def fails():
    with fixed_random_state():
        for draw, _ in GENERATORS.values():
            draw()
        raise ValueError


@pytest.mark.parametrize("name", GENERATORS)
def test_a_plan_of_a_network_that_draws_numbers_leaves_no_trace(name):
    model, (draw, seed) = of(Drawing), GENERATORS[name]
    seed(5)
    expected = [draw() for _ in range(3)]
    seed(5)
    found = [draw()]
    assert len(plan(model).blocks) == 2
    found.append(draw())
    with pytest.raises(ValueError):
        fails()
    assert [*found, draw()] == expected


def test_in_the_body_the_numbers_are_the_same_each_time():
    drawn = []
    for _ in range(2):
        with fixed_random_state():
            drawn.append([draw() for draw, _ in GENERATORS.values()])
        for draw, _ in GENERATORS.values():
            draw()
    assert drawn[0] == drawn[1]
