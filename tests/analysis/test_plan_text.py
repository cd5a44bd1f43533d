"""What a plan says: of statistics and activations that are not known, of growth, and read from an older version."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from torch import nn

from regulate import plan, regulate
from regulate.schema.plan import Plan

from ..helpers import small
from .odd_networks import Plain


class NoNorm(Plain):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.Identity()


class Linear(Plain):
    def middle(self, y):
        return y * 2 - 1


UNIT = "no norm known before the write point, unit statistics: "
LINEAR = "fused without an activation, none is known to leave their maps as they are: "


def notes(*blocks, **options):
    lines = str(plan(small(*blocks), **options)).splitlines()
    return [line for line in lines if line.startswith((UNIT, LINEAR))]


def test_blocks_without_known_statistics_or_activation_are_named():
    assert notes(Plain(), Plain()) == []
    assert notes(Plain(), NoNorm()) == [f"{UNIT}1.1; calibrate() measures them"]
    assert notes(Linear(), Plain()) == [f"{UNIT}1.0; calibrate() measures them", f"{LINEAR}1.0"]
    assert notes(Linear(), NoNorm(), fusion="residual") == []


def test_no_more_than_three_are_named():
    assert notes(*(NoNorm() for _ in range(3))) == [f"{UNIT}1.0, 1.1, 1.2; calibrate() measures them"]
    assert notes(*(NoNorm() for _ in range(5))) == [f"{UNIT}1.0, 1.1, 1.2 and 2 more; calibrate() measures them"]


def test_a_plan_of_the_first_version_is_read():
    drawn = plan(small())
    old = drawn.to_dict()
    for stage in old["stages"]:
        stage["holder"] = stage.pop("container")
    assert Plan.from_dict(old) == Plan.from_dict(drawn.to_dict()) == drawn
    assert drawn.stages[0].container == "1"


def warned(drawn, **base):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        replace(drawn, **base).warn_if_wide()
    return [str(one.message) for one in found]


def test_growth_by_more_than_a_half_in_parameters_or_multiply_adds_is_warned_of():
    drawn = plan(small())
    few, many = drawn.parameters, drawn.macs
    assert warned(drawn, base_parameters=2 * few, base_macs=2 * many) == []
    assert warned(drawn, base_parameters=2 * few, base_macs=None) == []
    for base in (
        {"base_parameters": 2 * few - 1, "base_macs": 9 * many},
        {"base_parameters": 9 * few, "base_macs": 2 * many - 1},
    ):
        (text,) = warned(drawn, **base)
        assert text.startswith("regulators add 50% to Sequential: ") and "stages=[...]" in text
    (text,) = warned(drawn, base_parameters=10 * few, base_macs=many)
    assert text.startswith("regulators add 100% to ")
    (text,) = warned(drawn, base_parameters=few, base_macs=None)
    assert text.startswith("regulators add 100% to ")


def test_a_network_that_is_regulated_is_warned_of_where_it_is_asked_for():
    model = small()
    with pytest.warns(UserWarning, match=r"regulators add \d+% to Sequential") as found:
        regulate(model, kernel="dense")
    assert [one.filename for one in found] == [__file__]
