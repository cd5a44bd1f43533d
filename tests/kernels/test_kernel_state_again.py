"""The rectified state that a fusion's 1x1 reads, made again in the backward pass where nobody else keeps it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from regulate.kernels import mixing
from regulate.kernels.norm import made_of
from regulate.nn.layers import Mix2d

from .test_kernel_fusion import LAYOUTS, images, norm


def held_elsewhere():
    """What saved tensors pass through in gradient checkpointing and in offloading."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "last"])
def test_a_rectified_state_is_made_again_where_the_mix_alone_would_keep_it(layout):
    part, mix, found = norm(6), Mix2d(13, 7, 1, bias=False), []
    x, raw = images((3, 7, 5, 4), layout), images((3, 6, 5, 4), layout)
    for hooks in (nullcontext, held_elsewhere):
        with hooks():
            h = part(raw)
            y = mix(x, h)
        kept = {t.data_ptr() for t in y.grad_fn.saved_tensors}
        assert (h.data_ptr() in kept) == (hooks is nullcontext) != (raw.data_ptr() in kept)
        grads = torch.autograd.grad(y.sin().sum(), [x, raw, *part.parameters(), mix.weight], create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, raw, *part.parameters(), mix.weight])
        found.append((grads, again))
    assert part.num_batches_tracked == 2, "made again, it moves no statistics"
    (grads, again), (other, other_again) = found
    assert all(map(torch.equal, grads, other))
    for a, b in zip(again, other_again, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_mix_whose_weights_are_frozen_makes_nothing_again(monkeypatch):
    monkeypatch.setattr(mixing, "again", lambda *_: pytest.fail("the state is not needed"))
    raw, mix = images((2, 6, 5, 4), LAYOUTS[0]), Mix2d(13, 7, 1).requires_grad_(False)
    with held_elsewhere():
        y = mix(torch.randn(2, 7, 5, 4), norm(6)(raw))
    y.sum().backward()
    assert raw.grad is not None


@pytest.mark.parametrize("change", ["in place", "out of sight", "another one"])
def test_a_state_that_was_changed_behind_its_norm_is_kept_as_it_is(change):
    part, mix, x, raw = norm(6), Mix2d(13, 7, 1), torch.randn(2, 7, 5, 4), images((2, 6, 5, 4), LAYOUTS[0])
    with held_elsewhere():
        h = part(raw)
        if change == "in place":
            h.mul_(2)
        elif change == "out of sight":
            with torch.no_grad():
                h.mul_(2)
        else:
            h = 2 * h
        y = mix(x, h)
    expected = F.conv2d(torch.cat([x, h.detach()], 1), mix.weight, mix.bias)
    found, right = (torch.autograd.grad(out.sin().sum(), mix.weight)[0] for out in (y, expected))
    assert torch.allclose(found, right, atol=1e-4)


def test_a_map_that_another_one_was_added_to_is_not_made_of_one():
    part, raw = norm(6), images((2, 6, 5, 4), LAYOUTS[0])
    assert len(made_of(part(raw))) == 4
    assert made_of(part(raw, raw)) == ()
    assert made_of(raw) == ()
