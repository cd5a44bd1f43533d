"""The rate at every time of a recipe, what the optimizer gets of it, what a command line puts over it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from experiments.options import RECIPES, options_of

from .runs import fitted


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("paper", {0: 0.1, 79.9: 0.1, 80: 0.01, 150: 0.01}),
        ("imagenet", {0: 0.06, 49.9: 0.06, 50: 0.006, 69.9: 0.006, 70: 0.0006, 90: 0.0006}),
        ("digits", {0: 0.1, 24.9: 0.1, 25: 0.01, 34.9: 0.01, 35: 0.001, 40: 0.001}),
        ("short", {0: 0, 1.25: 0.1, 2.5: 0.2, 6.25: 0.1, 9.25: 0.02, 10: 0}),
        ("upgrade", {0: 0, 0.3: 0.05, 0.6: 0.1, 3.3: 0.05, 6: 0}),
    ],
)
def test_the_rate_of_a_recipe(name, rates):
    assert {epoch: RECIPES[name].rate_at(epoch) for epoch in rates} == pytest.approx(rates, abs=1e-9)


def test_what_is_asked_for_goes_before_the_recipe():
    asked = ["--recipe", "paper", "--epochs", "5", "--rate", "0.5", "--batch", "7", "--milestones", "2", "4"]
    plan = options_of(asked).plan()
    assert (plan.epochs, plan.batch) == (5, 7)
    assert [plan.rate_at(epoch) for epoch in range(5)] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])
    assert options_of(["--milestones"]).plan().rate_at(39) == 0.1
    assert options_of(["--recipe", "short", "--milestones"]).plan().milestones == ()


@pytest.mark.parametrize(
    ("name", "momentum", "decay", "nesterov"),
    [
        ("paper", 0.9, 1e-4, False),
        ("imagenet", 0.9, 1e-4, False),
        ("digits", 0.9, 1e-4, False),
        ("short", 0.9, 5e-4, True),
        ("upgrade", 0.9, 1e-4, True),
    ],
)
def test_the_optimizer_is_the_recipes(name, momentum, decay, nesterov, tmp_path):
    run = fitted(tmp_path, "--recipe", name, "--epochs", "1", "--batch", "64")
    (group,) = run.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (momentum, decay, nesterov)
    assert len(group["params"]) == 2


def test_each_step_has_the_rate_of_its_middle(tmp_path):
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    try:
        fitted(tmp_path, "--recipe", "short", "--epochs", "2", "--batch", "32")
    finally:
        handle.remove()
    assert seen == pytest.approx([0.1, 0.2 * 5 / 6, 0.1, 0.2 / 6])
