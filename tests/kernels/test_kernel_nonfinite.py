"""NaN and infinity go where the equations take them: to no other image, and to no other pixel."""

from __future__ import annotations

import itertools

import pytest
import torch

from regulate.nn.cells import CELLS

from .test_kernels import FORMS, LAYOUTS, case, run

pytestmark = pytest.mark.slow

# Images that share a stack, that fill one, and that take several tiles; the last one in a stack of its own.
SHAPES = ((5, 3, 4, 5), (3, 2, 1, 3), (2, 17, 34, 33))
VALUES = (float("nan"), float("inf"))


def results(form, name, shape, layout, tensor, place, value):
    """New state and gradients of input and state; those of the parameters; with one number of one tensor replaced."""
    cell, x, state, grads = case(name, shape, layout)
    maps = [x, *state, *grads]
    with torch.no_grad():
        maps[tensor][place] = value
    found = run(form, cell, x, state, grads)
    return found[: len(maps)], found[len(maps) : len(maps) + len(list(cell.parameters()))]


def places(shape):
    """The corners of an image in the middle, its middle, and the last pixel of all."""
    n, c, h, w = (size - 1 for size in shape)
    middle = [(n // 2, c // 2, y, x) for y, x in itertools.product({0, h}, {0, w})]
    return [*middle, (n // 2, c, h // 2, w // 2), (n, c, h, w)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
def test_they_reach_the_pixels_of_the_equations(name, form, layout):
    tensors = {"rnn": 3, "gru": 3, "lstm": 5}[name]
    for shape, tensor, value in itertools.product(SHAPES, range(tensors), VALUES):
        for place in places(shape):
            found, of_parameters = results(form, name, shape, layout, tensor, place, value)
            expected, _ = results("reference", name, shape, layout, tensor, place, value)
            assert len(expected) == tensors
            for k, (a, b) in enumerate(zip(found, expected, strict=True)):
                here = (shape, tensor, value, place, k)
                finite = b.isfinite()
                assert a[finite].isfinite().all(), here
                assert torch.allclose(a[finite], b[finite], rtol=1e-4, atol=1e-4), here
                if value != value:
                    assert not a[~finite].isfinite().any(), here
                others = torch.arange(len(b)) != place[0]
                assert a[others].isfinite().all(), here
            for grad in of_parameters:
                by_channel = grad.view(-1, shape[1], grad[0].numel())
                channels = torch.arange(shape[1]) != place[1]
                assert by_channel[:, channels].isfinite().all(), (shape, tensor, value, place)
