"""The read map on the grid of the write point, also where code is compiled or traced and no shape may be asked for."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from regulate.rewrite.alignment import aligned


def test_a_read_map_of_another_grid_is_resampled():
    assert aligned(torch.randn(2, 8, 24, 20), torch.randn(2, 8, 16, 16), (1, 1), False).shape == (2, 8, 16, 16)


@pytest.mark.parametrize("way", ["eager", "compiled", "fx", "jit"])
@pytest.mark.parametrize(("stride", "size"), [((1, 1), (17, 16)), ((2, 2), (33, 31))])
def test_a_pooling_that_rounds_down_cuts_the_last_row(way, stride, size):
    def run(read, x):
        return aligned(read, x, stride, True)

    read, x = torch.randn(2, 8, *size), torch.randn(2, 8, 16, size[1] // stride[1])
    if way == "compiled":
        run = torch.compile(run, backend="eager", fullgraph=True)
    elif way == "fx":
        run = fx.symbolic_trace(run)
    elif way == "jit":
        run = torch.jit.trace(run, (read, x))
    expected = read[:, :, :: stride[0], :: stride[1]][:, :, : x.shape[2], : x.shape[3]]
    assert torch.equal(run(read, x), expected)
