"""Steps of which only one of the two results is used further."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from regulate import ConvLSTMCell, kernels
from regulate.kernels import aten
from regulate.kernels.cpu import native

from ..helpers import Watch


def gradients(form, which, zeros, watch=nullcontext, second=False):
    torch.manual_seed(1)
    cell = ConvLSTMCell(3)
    x, h, c, grad = (torch.randn(2, 3, 5, 4).requires_grad_() for _ in range(4))
    wanted = [x, *(() if zeros else (h, c)), *cell.parameters()]
    with kernels.use(form), watch() as seen:
        new = cell(x, None if zeros else (h, c))[which]
        found = torch.autograd.grad(new, wanted, grad, create_graph=second, allow_unused=True)
        if second:
            found = torch.autograd.grad(sum(g.sin().sum() for g in found if g is not None), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)], seen


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("zeros", [False, True], ids=["state", "zeros"])
@pytest.mark.parametrize("which", [0, 1], ids=["only H", "only C"])
@pytest.mark.parametrize("form", ["native", "aten", "operator"])
def test_gradients_of_one_result_alone(form, which, zeros, second, monkeypatch):
    ran = []
    for module, name in ((native, "forward"), (aten, "step")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=run, name=name: (ran.append(name), run(*args))[1])
    expected, _ = gradients("reference", which, zeros, second=second)
    assert ran == []
    if form == "operator":
        found, seen = gradients("native", which, zeros, Watch, second)
        assert "regulate.light_step.default" in seen.names
    else:
        found, _ = gradients(form, which, zeros, second=second)
        assert ran == [{"native": "forward", "aten": "step"}[form]]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert all(g.any() for g in expected[: 1 if zeros else 3])


def test_without_a_gradient_of_its_own_the_hidden_state_has_one_of_zeros(monkeypatch):
    """Which the kernels of a GPU read; the native ones would take None as well."""
    given, run = [], native.backward
    monkeypatch.setattr(native, "backward", lambda *args: (given.extend(args[-2:]), run(*args))[1])
    gradients("native", 1, zeros=False)
    dh, dc = given
    assert dh.shape == dc.shape == (2, 3, 5, 4)
    assert not dh.any() and dc.any()
