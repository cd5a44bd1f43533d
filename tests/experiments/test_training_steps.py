"""What an epoch and a test say, against figures by hand; what a run does beside its steps."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from experiments import batches, clock, data, loop, runner
from experiments.options import Options
from experiments.registry import EXPERIMENTS, jobs
from experiments.steps import Job, accuracy

from regulate import regulate

from ..helpers import small_block
from .runs import HERE, fitted


def says(logits, labels):
    return accuracy(nn.Identity(), [(logits, labels)], Job(Options(), Options().plan(), HERE, Path()))


def test_an_accuracy_counts_the_first_and_the_first_five():
    falling = torch.arange(10.0).flip(0).expand(10, 10)
    assert says(falling, torch.arange(10)) == (10, 50)
    assert says(falling[:3, :3], torch.arange(3)) == (100 / 3, 100)


def test_a_loss_is_the_mean_over_the_images(tmp_path):
    model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(1, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    (entry,) = fitted(tmp_path, "--epochs", "1", "--rate", "0", model=model).history
    labels = data.load("digits", subset=64).train.labels
    assert entry["loss"] == pytest.approx(math.log(10))
    assert entry["train_top1"] == pytest.approx(100 * (labels == 0).sum().item() / 64)


def test_the_first_steps_time_is_that_of_the_others(monkeypatch):
    wall, processor = iter((10.0, 18.0, 18.0)), iter((3.0, 5.0, 5.0))
    fake = SimpleNamespace(perf_counter=wall.__next__, process_time=processor.__next__)
    monkeypatch.setattr(clock, "time", fake)
    watch = clock.Clock()
    watch.first_step_done()
    assert watch.read(5) == {"seconds": 10, "processor_seconds": 2.5}
    assert watch.read(1) == {"seconds": 0, "processor_seconds": 0}


def test_all_images_in_memory_are_tested():
    digits = data.load("digits")
    found = batches.testing(digits, Options(), HERE)
    assert len(digits.test) > 500
    assert torch.equal(torch.cat([labels for _, labels in found]), digits.test.labels)


def test_a_runs_seed_draws_its_images():
    first, again, other = (loop.data_of(Options(subset=64, seed=seed)).train.pixels for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("cell", ["gru", "none"])
def test_a_memory_that_does_not_learn_is_noticed(cell, tmp_path):
    blocks = nn.Sequential(small_block(), small_block())
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    if cell != "none":
        model = regulate(model, cell, input_size=(1, 16, 16))
        model[1][0].regulator.cell.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(tmp_path, "--cell", cell, "--epochs", "3", "--batch", "8", model=model)
    assert [str(one.message)[:23] for one in caught] == ["no gradient has reached"] * (cell != "none")


def test_a_run_of_the_runner_has_one_thread(tmp_path, monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(runner, "run", lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        runner._work(next(jobs([EXPERIMENTS["smoke"]])), runner.Folders(tmp_path, tmp_path), None)
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
