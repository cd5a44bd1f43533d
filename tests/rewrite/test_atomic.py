"""An edit that fails is undone, and strange classes are no obstacle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from regulate import (
    UnsupportedModelError,
    is_regulated,
    regulate,
    unregulate,
)
from regulate.models.cifar import CifarBlock
from regulate.rewrite import install

from ..helpers import network, small, stir

pytestmark = pytest.mark.slow


class Refuses(nn.Sequential):
    """A container that takes no new attributes."""

    def __setattr__(self, name, value):
        if name != "training" and not isinstance(value, nn.Module | dict):
            raise AttributeError(name)
        super().__setattr__(name, value)


class Slots(nn.Sequential):
    __slots__ = ("one", "two")


class NoSubclass(CifarBlock):
    def __init_subclass__(cls):
        raise TypeError("this class is final")


@pytest.mark.parametrize("kind", [Refuses, Slots])
def test_containers_of_strange_classes_are_regulated_and_given_back(kind):
    model = small(kind=kind).eval()
    x = torch.randn(2, 3, 8, 8)
    regulated = regulate(model)
    assert isinstance(regulated[1], kind)
    assert torch.equal(regulated(x), model(x))
    assert type(unregulate(regulated)[1]) is kind


def test_a_class_that_refuses_subclasses_is_no_obstacle():
    model = small(*(NoSubclass(8, 8, 1, "B", 0) for _ in range(2)))
    assert isinstance(regulate(model)[1][0], NoSubclass)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [None, nn.Linear(2, 2), "a string"])
def test_something_called_regulator_is_named_before_anything_happens(value, inplace):
    model = small()
    model[1][1].regulator = value
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"1\.1 .*something of that name"):
        regulate(model, inplace=inplace)
    assert snapshot(model) == before


class Unreadable(CifarBlock):
    @property
    def regulator(self):
        raise RuntimeError("not yet")


def test_a_property_called_regulator_is_named_as_well():
    model = small(*(Unreadable(8, 8, 1, "B", 0) for _ in range(2)))
    with pytest.raises(UnsupportedModelError, match=r"1\.0 .*something of that name"):
        regulate(model, inplace=True)


def snapshot(model):
    """Everything about a model that an edit could change, by identity."""
    return [
        (name, id(module), type(module), {key: _identity(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def _identity(value):
    return {key: id(entry) for key, entry in value.items()} if isinstance(value, dict) else id(value)


class Injected(BaseException):
    pass


def run_failing_at(statement, do):
    """Runs a function and raises at the n-th line that the code of the rewrite executes; False if there is none."""
    folder, count = str(Path(install.__file__).parent), 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder) or frame.f_code.co_name in ("_clear", "release", "leave"):
            return None
        if event == "line":
            count += 1
            if count == statement:
                sys.settrace(None)
                raise Injected
        return trace

    sys.settrace(trace)
    try:
        do()
    except Injected:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.use("regulate on wrapped models", "regulate(inplace=True): a failure at any statement changes nothing")
def test_a_failure_at_any_statement_of_the_rewrite_changes_nothing():
    model = small()
    before = snapshot(model)
    statement = 1
    while run_failing_at(statement, lambda: regulate(model, inplace=True)):
        assert snapshot(model) == before, f"statement {statement}"
        assert not is_regulated(model)
        statement += 1
    assert statement > 100
    assert is_regulated(model)


def test_a_part_of_a_stage_cannot_be_taken_apart():
    model = regulate(network("resnet18"))
    with pytest.raises(UnsupportedModelError, match="one block of"):
        unregulate(model.layer1[0])
    assert is_regulated(model.layer1)
    assert stir(model) is model
