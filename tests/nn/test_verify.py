"""`verify` only reads the model, names the very gate that is dead, and sees an error of one in ten thousand."""

from __future__ import annotations

import pytest
import torch

from regulate import RegulatorConfig, regulate
from regulate.testing import example_inputs, perturb, verify, verify_pair

from ..helpers import small, small_block

SIZE = (3, 16, 16)


def pair(**options):
    model = perturb(small(), [example_inputs(small(), SIZE, batch=4, seed=seed) for seed in (1, 2)])
    return model, regulate(model, input_size=16, **options)


def judged(model, regulated):
    return verify_pair(model, regulated, example_inputs(model, SIZE), 2)


@pytest.mark.parametrize("shake", [True, False])
def test_the_model_is_only_read(shake):
    model = small()
    model[1][0].bn1.eval()
    model[1][1].conv2.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [dict(vars(m)) for m in model.modules()]
    learns = [p.requires_grad for p in model.parameters()]
    assert verify(model, RegulatorConfig(), SIZE, shake).passed
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [dict(vars(m)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == learns
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_was_shaken_keeps_its_momenta():
    first, second = small_block(), small_block()
    first.bn1.momentum, first.bn2.momentum, second.bn2.momentum = 0.3, 0.01, None
    model = perturb(small(first, second), [(torch.randn(4, *SIZE),), (torch.randn(4, *SIZE),)])
    assert [m.momentum for m in model.modules() if hasattr(m, "momentum")] == [0.3, 0.01, 0.1, None]


def broken_at_the_third_backward(parameter, axis, part, value):
    """Give part of a parameter this gradient; earlier NaN would spread through the clipped step to all."""
    runs = []

    def hook(grad):
        runs.append(None)
        return grad.index_fill(axis, torch.arange(*part), value) if len(runs) == 3 else grad

    parameter.register_hook(hook)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("kernel", ["light", "dense"])
def test_the_one_gate_that_gets_no_gradient_is_named(kernel, value):
    model, regulated = pair(kernel=kernel)
    gates = regulated[1][0].regulator.cell.gates
    broken_at_the_third_backward(gates.weight, 0, (16, 24), value)
    broken_at_the_third_backward(gates.bias, 0, (0, 8), value)
    found = judged(model, regulated)
    path, halves = "1.0.regulator.cell.gates", [0] if kernel == "light" else [0, 1]
    weights = [f"{path}.weight gate 2 half {at}" for at in halves]
    assert list(found.lost) == [*weights, f"{path}.bias gate 0 half 0"]
    assert not found.passed


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_the_one_half_of_a_mix_that_gets_no_gradient_is_named(value):
    model, regulated = pair()
    broken_at_the_third_backward(regulated[1][0].regulator.cell.gates.mix, 1, (0, 1), value)
    broken_at_the_third_backward(regulated[1][1].regulator.mix.weight, 1, (8, 16), value)
    gates = [f"1.0.regulator.cell.gates.mix gate {gate} half 0" for gate in range(4)]
    assert set(judged(model, regulated).lost) == {*gates, "1.1.regulator.mix.weight half 1"}


def test_an_error_of_one_in_ten_thousand_does_not_pass():
    model, regulated = pair()
    assert judged(*pair()).passed
    with torch.no_grad():
        regulated[1][1].bn2.weight.mul_(1 + 3e-4)
    found = judged(model, regulated)
    assert 3e-5 < found.eval_error < 3e-4
    assert found.lost == ()
    assert not found.passed
