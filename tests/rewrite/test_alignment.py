"""The read map on the grid of the write point, also where code is compiled or traced and no shape may be asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from regulate.rewrite.alignment import aligned


def test_a_read_map_of_another_grid_is_resampled():
    assert aligned(torch.randn(2, 8, 24, 20), torch.randn(2, 8, 16, 16), (1, 1), False).shape == (2, 8, 16, 16)


@pytest.mark.parametrize("way", ["eager", "compiled", "fx", "jit"])
@pytest.mark.parametrize(
    ("stride", "size", "start"),
    [((1, 1), (17, 16), (0, 0)), ((2, 2), (33, 31), (0, 0)), ((1, 1), (20, 18), (2, 1)), ((2, 1), (37, 19), (1, 1))],
)
def test_a_cut_leaves_the_middle_and_of_one_row_too_many_the_first(way, stride, size, start):
    def run(read, x):
        return aligned(read, x, stride, True)

    read, x = torch.randn(2, 8, *size), torch.randn(2, 8, 16, size[1] // stride[1] - 2 * start[1])
    if way == "compiled":
        run = torch.compile(run, backend="eager", fullgraph=True)
    elif way == "fx":
        run = fx.symbolic_trace(run)
    elif way == "jit":
        run = torch.jit.trace(run, (read, x))
    (top, left), (height, width) = start, x.shape[2:]
    expected = read[:, :, :: stride[0], :: stride[1]][:, :, top : top + height, left : left + width]
    assert torch.equal(run(read, x), expected)


def test_a_read_map_that_is_too_small_to_be_cut_is_resampled():
    read = torch.randn(2, 8, 15, 18)
    expected = F.interpolate(read[..., 1:17], (16, 16))
    assert torch.equal(aligned(read, torch.randn(2, 8, 16, 16), (1, 1), True), expected)
