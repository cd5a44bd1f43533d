"""Parameters and multiply-adds against the closed forms and the paper's tables."""

from __future__ import annotations

import pytest
import torch
from timm import create_model
from torch.utils.flop_counter import FlopCounterMode

from regulate import plan, regulate, regulator_parameters
from regulate.models.cifar import cifar_resnet

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def closed_form(widths, blocks, cell):
    return sum(12 * GATES[cell] * n + t * (2 * n * n + 4 * n) for n, t in zip(widths, blocks, strict=True))


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_cifar_parameters(depth, cell):
    drawn = plan(cifar_resnet(depth), cell, input_size=32)
    blocks = [(depth - 2) // 6] * 3
    assert drawn.parameters == closed_form((16, 32, 64), blocks, cell)


def test_resnet50_lstm_is_exact():
    model = create_model("resnet50")
    regulated = regulate(model, "lstm")
    new = sum(p.numel() for p in regulator_parameters(regulated))
    assert new == 2_576_128 == plan(model, "lstm").parameters
    assert sum(p.numel() for p in regulated.parameters()) - sum(p.numel() for p in model.parameters()) == new


def test_resnet20_gru_is_the_papers_table_1():
    drawn = plan(cifar_resnet(20), "gru", input_size=32)
    assert drawn.parameters == 37_632
    assert 2 * drawn.macs / 1e6 == pytest.approx(15.1, abs=0.05)


# Table IV prints the increments in units of 0.01M.
@pytest.mark.parametrize(
    ("depth", "cell", "printed"),
    [
        (20, "gru", 0.04),
        (20, "lstm", 0.04),
        (32, "gru", 0.06),
        (32, "lstm", 0.07),
        (56, "gru", 0.11),
        (56, "lstm", 0.12),
    ],
)
def test_table_4(depth, cell, printed):
    assert plan(cifar_resnet(depth), cell).parameters / 1e6 == pytest.approx(printed, abs=0.015)


def test_planned_macs_are_counted_flops():
    """The dense kernel is convolutions only, so torch's counter sees all that the plan predicts."""
    model = cifar_resnet(20)
    drawn = plan(model, "lstm", kernel="dense", input_size=32)
    counts = []
    for network in (model, regulate(model, "lstm", kernel="dense")):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.randn(1, 3, 32, 32))
        counts.append(counter.get_total_flops() // 2)
    assert counts[0] == drawn.base_macs
    assert counts[1] - counts[0] == drawn.macs
