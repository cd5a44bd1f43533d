"""`calibrate` refuses what it cannot measure, says why, and changes nothing where it fails."""

from __future__ import annotations

import copy

import pytest
import torch

from regulate import CalibrationError, calibrate, disabled, regulate
from regulate.models.cifar import cifar_resnet

pytestmark = pytest.mark.slow


def test_calibrate_refuses_what_it_cannot_do():
    with pytest.raises(CalibrationError, match="got no batch"):
        calibrate(regulate(cifar_resnet(14)), [])
    with pytest.raises(CalibrationError, match="none"):
        calibrate(regulate(cifar_resnet(14), fusion="residual"), [torch.randn(1, 3, 32, 32)])
    for init in ("random", "identity"):
        model = regulate(cifar_resnet(14), init=init)
        if init == "identity":
            with torch.no_grad():
                model.layer1[0].regulator.mix.weight[0, 20] = 1e-3
        with pytest.raises(CalibrationError, match="before training"):
            calibrate(model, [torch.randn(1, 3, 32, 32)])


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        (lambda: [torch.randn(1, 3, 32, 32), torch.full((1, 3, 32, 32), torch.nan)], CalibrationError, "batch 1"),
        (lambda: [torch.full((2, 3, 32, 32), torch.inf)], CalibrationError, r"into layer1\.0; nothing was changed"),
        (lambda: [torch.full((2, 3, 32, 32), 1e30)], CalibrationError, "an overflow"),
        (lambda: torch.randn(2, 3, 32, 32), TypeError, r"pass a list, \[images\]"),
        (lambda: [{"image": torch.randn(2, 3, 32, 32)}], TypeError, "got a dict; pass"),
        (lambda: [()], TypeError, "starts with one"),
    ],
)
def test_calibrate_changes_nothing_where_it_fails(batches, error, says):
    model = regulate(cifar_resnet(14)).train()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(error, match=says):
        calibrate(model, batches())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert attributes == {name: dict(vars(m)) for name, m in model.named_modules()}
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


def test_calibrate_says_why_it_cannot_run():
    with torch.device("meta"):
        bare = regulate(cifar_resnet(14))
    with pytest.raises(CalibrationError, match="on the meta device; give it memory"):
        calibrate(bare, [torch.randn(2, 3, 32, 32)])
    model = regulate(cifar_resnet(14))
    with disabled(model), pytest.raises(CalibrationError, match="switched off here"):
        calibrate(model, [torch.randn(2, 3, 32, 32)])


def test_calibrate_changes_nothing_where_the_last_norm_cannot_be_written():
    model = regulate(cifar_resnet(14))
    with torch.inference_mode():
        model.layer3[1].regulator.mix_norm.running_mean = torch.zeros(64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inference"):
        calibrate(model, [torch.randn(2, 3, 32, 32)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
