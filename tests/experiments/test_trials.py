"""What the demo makes of its trials, against figures by hand; what its three trainings are asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import upgrade_backbone
from experiments import trials

from .test_demo import demo


def trial(seed, regulated, plain):
    right = {"regulated": torch.tensor([True, True, True, False]), "plain": torch.tensor([True, False, False, True])}
    curves = {"regulated": [50.0, regulated], "plain": [60.0, plain]}
    return trials.Trial(
        seed, [20.0, 40.0], curves, {"regulated": 3.0, "plain": 2.0}, {"regulated": 12, "plain": 7}, right
    )


def test_a_table_shows_the_last_epoch():
    rows = [line.split() for line in trials.summary([trial(0, 70.0, 64.0), trial(1, 74.0, 65.0)]).splitlines()]
    assert rows[1:] == [
        ["regulated", "12", "40.00%", "72.00%", "3.0"],
        ["plain", "7", "40.00%", "64.50%", "2.0"],
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([(70, 64), (74, 65)], "+7.50 points, 95 % interval -11.56 to +26.56 over 2 seeds: no more than chance"),
        ([(70, 64), (71, 64.5)], "+6.25 points, 95 % interval +3.07 to +9.43 over 2 seeds: more than chance"),
        ([(64, 70), (64.5, 71)], "-6.25 points, 95 % interval -9.43 to -3.07 over 2 seeds: more than chance"),
        ([(70, 64), (71, 65)], "+6.00 points with each of 2 seeds"),
        ([(70, 64)], "+6.00 points; one seed cannot be told from chance"),
    ],
)
def test_a_verdict_is_of_the_last_epoch(values, words):
    said = trials.verdict([trial(seed, *pair) for seed, pair in enumerate(values)])
    assert f"Regulated minus plain: {words}" in said
    count = ", ".join("2" * len(values)), ", ".join("1" * len(values))
    assert f"Of 4 test images, regulated alone has {count[0]} right, plain alone {count[1]}" in said


@pytest.mark.slow
def test_both_networks_go_on_from_one_with_the_same_images_and_rate(tmp_path, monkeypatch):
    seen = []

    def trains(model, data, job, start=None):
        seen.append((job.options, {name: value.clone() for name, value in model.state_dict().items()}, data.train))
        nn.init.constant_(model.fc.bias, len(seen))
        return SimpleNamespace(history=[{"top1": 50.0, "seconds": 1.0}])

    monkeypatch.setattr(upgrade_backbone, "fit", trains)
    monkeypatch.setattr(upgrade_backbone, "predictions", lambda *_: (torch.zeros(2), torch.zeros(2)))
    assert demo(monkeypatch, tmp_path, "--rate", "0.2", "--finetune-epochs", "2", "--cell", "gru") == 0
    assert [(one.seed, one.cell, one.epochs, one.rate) for one, _, _ in seen] == [
        (seed, *rest)
        for seed in range(2)
        for rest in (("none", 1, 0.2), ("gru", 2, pytest.approx(0.02)), ("none", 2, pytest.approx(0.02)))
    ]
    for _, (_, regulated, images), (_, plain, others) in (seen[:3], seen[3:]):
        assert images is others and plain["fc.bias"].unique().numel() == 1
        assert {key for key in regulated if ".regulator." not in key} == plain.keys() < regulated.keys()
        assert all(torch.equal(plain[key], regulated[key]) for key in plain)
    assert not torch.equal(seen[0][1]["conv1.weight"], seen[3][1]["conv1.weight"])
