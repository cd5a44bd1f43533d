"""`calibrate` measures over all images alike, however they are cut into batches."""

from __future__ import annotations

import copy

import torch

from regulate import calibrate, regulate

from ..helpers import small


def test_batches_of_unequal_sizes_count_by_their_images():
    model = regulate(small())
    few, many = torch.randn(2, 3, 8, 8), 2 * torch.randn(5, 3, 8, 8) + 1
    whole = calibrate(copy.deepcopy(model), [torch.cat([few, many])]).state_dict()
    parts = calibrate(model, [few, many]).state_dict()
    assert all(torch.allclose(parts[key], whole[key], rtol=1e-4, atol=1e-6) for key in whole)
    last = calibrate(model, [many]).state_dict()
    moved = [key for key in whole if not torch.allclose(last[key], whole[key], rtol=1e-2)]
    assert moved and all(".mix_norm." in key for key in moved)
