"""The network of a run is the one that was asked for: every option, the start, what is frozen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from experiments import data, networks
from experiments.options import options_of

import regulate
from regulate.models.cifar import SqueezeExcite, ZeroPadShortcut
from regulate.nn.identity_init import is_settled
from regulate.nn.regulator import Fusion

from .runs import run

pytestmark = pytest.mark.slow


def built(*arguments):
    return networks.build(options_of(arguments), data.load("digits"))


def fusions(model):
    return [module for module in model.modules() if isinstance(module, Fusion)]


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_only_the_regulators_of_a_frozen_network_are_trained(tmp_path):
    start = tmp_path / "start.safetensors"
    save_file(built().state_dict(), start)
    asked = ("--weights", str(start), "--cell", "lstm", "--frozen")
    before = built(*asked).state_dict()
    run(tmp_path / "run", *asked, "--epochs", "1")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert after.keys() == before.keys()
    other = changed(before, after)
    assert len(other) > 20 and all(".regulator." in key for key in other)
    assert not changed(load_file(start), after)


@pytest.mark.parametrize(
    ("option", "found"),
    [
        (("--kernel", "dense"), lambda part: part.cell.gates.kernel == "dense"),
        (("--fusion", "residual"), lambda part: part.skip and isinstance(part.mix_norm, nn.Identity)),
        (("--norm", "group"), lambda part: isinstance(part.hidden_norm, nn.GroupNorm)),
        (("--norm", "none"), lambda part: isinstance(part.hidden_norm, nn.Identity)),
        (("--init", "identity"), is_settled),
    ],
)
def test_a_regulator_is_as_asked(option, found):
    assert [found(fusions(built("--cell", "lstm", *asked))[0]) for asked in (option, ())] == [True, False]


def test_blocks_are_planned_at_the_size_of_the_images(monkeypatch):
    seen, whole = [], regulate.regulate
    monkeypatch.setattr(regulate, "regulate", lambda *a, **options: seen.append(options) or whole(*a, **options))
    built("--cell", "rnn", "--seed", "3")
    networks.build(options_of(["--cell", "rnn"]), data.Data([], [], 10, 3, 24))
    assert [options["input_size"] for options in seen] == [(1, 16, 16), (3, 24, 24)]
    assert [options["seed"] for options in seen] == [3, 0]


@pytest.mark.parametrize("pretrained", [True, False])
def test_timms_weights_are_asked_for_and_regulated_at_the_identity(pretrained, monkeypatch):
    seen, create = [], timm.create_model

    def offline(name, pretrained, **options):
        seen.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    model = built("--model", "timm/resnet18", "--cell", "gru", *(("--pretrained",) if pretrained else ()))
    assert seen == [("resnet18", pretrained)]
    assert {is_settled(part) for part in fusions(model)} == {pretrained}


def test_a_cifar_network_is_as_asked():
    plain = built()
    assert isinstance(plain.layer2[0].downsample, nn.Sequential)
    assert not [module for module in plain.modules() if isinstance(module, SqueezeExcite)]
    assert isinstance(built("--shortcut", "A").layer2[0].downsample, ZeroPadShortcut)
    assert built("--model", "se_resnet20").layer1[0].se.reduce.out_channels == 2
    assert built("--width", "24").layer1[0].conv1.out_channels == 24
    assert len(built("--model", "resnet32").layer3) == 5
