"""Looking into a network that was edited after it was regulated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate import calibrate, disabled, regulate
from regulate.errors import CalibrationError
from regulate.inspect import outputs, record, similarity

from ..helpers import network, stirred

X = torch.randn(2, 3, 16, 16)


def removed(stage):
    del stage[2]


def wrapped(stage):
    stage[1] = nn.Sequential(stage[1])


def inserted(stage):
    stage.insert(0, nn.Identity())


EDITED = {removed: ["0", "1"], wrapped: ["0", "1.0", "2"], inserted: ["1", "2", "3"]}


@pytest.mark.parametrize("edit", EDITED)
def test_blocks_are_found_where_they_are(edit):
    model = stirred(network("cifar/20"))
    edit(model.layer1)
    names = [f"layer1.{place}" for place in EDITED[edit]]
    steps = record(model, X)
    assert [step.block for step in steps[names[0]]] == names
    assert len(similarity(model, X)[names[0]]) == len(names) - 1
    with torch.no_grad():
        expected = model.layer1(model.relu(model.bn1(model.conv1(X))))
    assert torch.allclose(steps[names[0]][-1].output, expected, atol=1e-4)


class Around(nn.Module):
    """As peft puts something around what it trains in full."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.unused = inner, nn.Linear(1, 1)
        self.cell = getattr(inner, "cell", None)

    def forward(self, *args):
        return self.inner(*args)


def test_a_wrapper_around_a_regulator_is_seen_through():
    model = stirred(network("cifar/14"))
    expected = record(model, X)
    for block in model.layer1:
        block.regulator = Around(block.regulator)
    found = record(model, X)
    assert [step.share for step in found["layer1.0"]] == [step.share for step in expected["layer1.0"]]
    assert all(step.gates for step in found["layer1.0"])


def test_what_is_switched_off_is_not_recorded():
    model = regulate(network("cifar/14"))
    with disabled(model):
        with pytest.raises(ValueError, match="switched off"):
            record(model, X)
        assert outputs(model, X)


def test_norms_without_running_statistics_are_not_calibrated():
    model = torch.func.replace_all_batch_norm_modules_(regulate(network("cifar/14")))
    with pytest.raises(CalibrationError, match="this model has none"):
        calibrate(model, [X])
