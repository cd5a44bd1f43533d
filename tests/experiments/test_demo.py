"""The demo keeps what it has: a failing seed, Ctrl-C, a picture that cannot be drawn, a network without blocks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import upgrade_backbone
from experiments import checkpoint
from experiments.trials import NETWORKS

pytestmark = pytest.mark.slow

SHORT = ("--subset", "64", "--epochs", "1", "--finetune-epochs", "1", "--seeds", "2", "--batch", "32")


def demo(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["upgrade_backbone.py", *SHORT, "--out", str(out), *arguments])
    return upgrade_backbone.main()


def figures(out):
    found = json.loads((out / "trials.json").read_text())["trials"]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in found]


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("the disk is gone"), 2), (KeyboardInterrupt(), 130)])
def test_finished_seeds_are_told_and_the_others_go_on(error, code, tmp_path, monkeypatch, capsys):
    assert demo(monkeypatch, tmp_path / "whole") == 0
    assert "over 2 seeds" in (said := capsys.readouterr().out) or "with each of 2 seeds" in said
    fit, calls = upgrade_backbone.fit, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # the second seed's first fine-tuning
            raise error
        return fit(*arguments)

    monkeypatch.setattr(upgrade_backbone, "fit", stops)
    assert demo(monkeypatch, tmp_path / "parts") == code
    said = capsys.readouterr()
    assert "one seed cannot be told from chance" in said.out
    assert len(said.err.strip().splitlines()) == 1
    assert [one["seed"] for one in figures(tmp_path / "parts")] == [0]
    monkeypatch.undo()
    assert demo(monkeypatch, tmp_path / "parts", "--resume") == 0
    assert re.findall(r"^.*(seed \d, \w+): epoch", capsys.readouterr().out, re.MULTILINE) == [
        "seed 1, regulated",
        "seed 1, plain",
    ]
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_the_file_holds_what_the_verdict_says(tmp_path, monkeypatch, capsys):
    assert demo(monkeypatch, tmp_path) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "trials.json").read_text())
    assert found["asked"]["subset"] == 64
    last = [{name: one[name][-1] for name in NETWORKS} for one in found["trials"]]
    mean = sum(one["regulated"] - one["plain"] for one in last) / 2
    assert f"Regulated minus plain: {mean:+.2f} points" in said
    gained = ", ".join(str(one["right alone"]["regulated"]) for one in found["trials"])
    assert f"Of {found['trials'][0]['test images']} test images, regulated alone has {gained} right" in said


def test_a_picture_that_cannot_be_drawn_costs_no_figures(tmp_path, monkeypatch, capsys):
    (tmp_path / "curves.png").mkdir()
    assert demo(monkeypatch, tmp_path, "--seeds", "1") == 2
    said = capsys.readouterr()
    assert "one seed cannot be told from chance" in said.out
    assert "curves.png" in said.err and len(said.err.splitlines()) == 1


def test_a_network_that_cannot_be_upgraded_is_not_trained_first(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            imsave(tmp_path / split / name / "0.png", np.zeros((40, 40, 3)))
    options = ("--model", "resnet10t", "--data", str(tmp_path), "--size", "32", "--subset", "2", "--batch", "2")
    assert demo(monkeypatch, tmp_path / "out", *options) == 2
    said = capsys.readouterr()
    assert "epoch" not in said.out
    assert "every stage has one block" in said.err or "resid" in said.err
    assert not (tmp_path / "out" / "seed-0").exists()


def test_fine_tuning_goes_on_from_the_same_network_alone(tmp_path, monkeypatch, capsys):
    once = ("--seeds", "1", "--epochs")
    assert demo(monkeypatch, tmp_path / "whole", *once, "2") == 0
    assert demo(monkeypatch, tmp_path / "parts", *once, "1") == 0
    # Digits begin anew where --resume is not given, with nothing of what was there.
    fit = upgrade_backbone.fit
    with monkeypatch.context() as patch:
        patch.setattr(upgrade_backbone, "fit", lambda *a: fit(*a) and (_ for _ in ()).throw(KeyboardInterrupt))
        assert demo(monkeypatch, tmp_path / "parts", *once, "2") == 130
    assert demo(monkeypatch, tmp_path / "parts", *once, "2", "--resume") == 0
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    trained = tmp_path / "parts" / "seed-0" / "trained" / "checkpoint.pt"
    trained.unlink()
    capsys.readouterr()
    assert demo(monkeypatch, tmp_path / "parts", *once, "3", "--resume") == 2
    assert "a run with other weights" in capsys.readouterr().err


def test_trials_on_a_users_images_are_not_begun_anew(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out" / "seed-1" / "plain"
    folder.mkdir(parents=True)
    torch.save({"model": {}, "optimizer": {}, "history": [{}], "asked": {}}, folder / "checkpoint.pt")
    options = ("--model", "resnet10t", "--data", str(tmp_path))
    assert demo(monkeypatch, tmp_path / "out", *options) == 2
    assert "holds 1 epochs of a run; give --resume" in capsys.readouterr().err


def test_two_demos_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    with checkpoint.alone(tmp_path):
        assert demo(monkeypatch, tmp_path) == 2
    assert "another process trains in" in capsys.readouterr().err


def test_a_network_that_diverges_is_named(tmp_path, monkeypatch, capsys):
    assert demo(monkeypatch, tmp_path, "--rate", "1e30") == 2
    assert "seed 0, training: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--subset", "--size", "--batch", "--finetune-epochs"])
def test_numbers_are_counts(option, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        demo(monkeypatch, tmp_path, option, "0")
    assert "takes 1 or more" in capsys.readouterr().err
