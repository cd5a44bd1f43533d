"""Under autocast the layers of a fusion compute as torch's own, and not by the faster ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regulate.nn.layers import BatchNormReLU2d, Mix2d

X = torch.randn(2, 4, 6, 5)


@pytest.mark.parametrize("grad", [True, False])
def test_the_results_are_those_of_torchs_own_operations(grad):
    mix, h = Mix2d(8, 4, 1), X.flip(0)
    norms = BatchNormReLU2d(4), nn.BatchNorm2d(4)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y, expected = mix(X, h), mix(torch.cat([X, h], 1))
        for one, z in ((y, expected), (norms[0](y), norms[1](y).relu())):
            assert one.dtype == z.dtype and torch.equal(one, z)
    assert y.dtype == torch.bfloat16
