"""How long a gradient is waited for where nobody says it."""

from __future__ import annotations

import warnings

import pytest
import torch

from regulate import regulate
from regulate.training.gradients import GradientWatch

from ..helpers import small


def test_the_warning_comes_after_twenty_steps():
    model, x = regulate(small()).train(), torch.randn(1, 3, 8, 8)
    GradientWatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            model(x)
    with pytest.warns(UserWarning, match=r"no gradient has reached 1\.0\.regulator\.cell in 20 steps"):
        model(x)
    assert not model._forward_pre_hooks
