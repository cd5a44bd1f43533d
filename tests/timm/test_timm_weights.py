"""Weights of timm's and of regulated networks fill a regulated one, and its start is drawn anew or kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models import load_checkpoint
from torch import nn

from regulate import CheckpointError, is_regulated, regulate, regulator_parameters, unregulate
from regulate.rewrite.guard import regulators

from ..helpers import stir
from .regulated import NAME, at_its_start, build, out

pytestmark = pytest.mark.slow


def test_pretrained_weights_are_the_originals_and_the_start_is_drawn_from_them(plain, original):
    model = build(f"{NAME}.a1_in1k", pretrained=True, pretrained_cfg_overlay={"file": original})
    assert torch.equal(out(model), out(plain))
    assert at_its_start(model)
    assert model.pretrained_cfg["file"] == original
    assert model.pretrained_cfg["tag"] == "a1_in1k"
    assert model.default_cfg is model.pretrained_cfg
    assert "state_dict" not in model.pretrained_cfg
    fewer = build(pretrained=True, pretrained_cfg_overlay={"file": original}, num_classes=5, in_chans=1)
    assert torch.equal(fewer.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    assert torch.allclose(fewer.conv1.weight, plain.conv1.weight.sum(1, keepdim=True), atol=1e-6)


def test_pretrained_weights_of_a_regulated_network_fill_it(trained):
    model, path = trained
    filled = build(pretrained=True, pretrained_cfg_overlay={"file": path})
    assert torch.equal(out(filled), out(model))
    assert not at_its_start(filled)
    fewer = build(pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=5)
    assert torch.equal(fewer.layer1[0].regulator.mix.weight, model.layer1[0].regulator.mix.weight)
    given = {"state_dict": model.state_dict()}
    assert torch.equal(out(build(pretrained=True, pretrained_cfg_overlay=given)), out(model))
    for other in ({"cell": "gru"}, {"stages": [1]}):
        with pytest.raises(CheckpointError, match="pass the options that theirs was made with"):
            build(pretrained=True, pretrained_cfg_overlay={"file": path}, **other)


def test_checkpoint_path_takes_a_regulated_checkpoint_and_a_plain_one(plain, original, trained):
    assert torch.equal(out(build(checkpoint_path=trained[1])), out(trained[0]))
    model = build(checkpoint_path=original)
    assert torch.equal(out(model), out(plain))
    assert at_its_start(model)
    moved = copy.deepcopy(trained[0])
    load_checkpoint(moved, original)
    assert at_its_start(moved)


def test_a_state_that_does_not_hold_all_blocks_leaves_the_regulators_alone(trained):
    model = copy.deepcopy(trained[0])
    before = out(model)
    model.load_state_dict({}, strict=False)
    model.load_state_dict({"layer1.0.conv1.weight": model.layer1[0].conv1.weight}, strict=False)
    assert torch.equal(out(model), before)
    state = model.state_dict()
    del state["layer1.0.regulator.mix.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    unregulate(model)
    model.load_state_dict(build("resnet18").state_dict())
    assert not is_regulated(model)


def test_a_network_that_was_regulated_anew_takes_plain_weights(plain):
    model = regulate(unregulate(build()), stages=[0])
    model.load_state_dict(build("resnet18").state_dict())
    model.init_weights()
    assert [path for path, _ in regulators(model)] == ["layer1.0.regulator", "layer1.1.regulator"]
    model.load_state_dict(plain.state_dict())
    assert torch.equal(out(model), out(plain))


class PlainCell(nn.Module):
    """A cell of a user's own, with a convolution that timm would initialise."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x, state):
        before = torch.zeros_like(x) if state is None else state[0]
        return (torch.tanh(self.conv(torch.cat([x, before], 1))),)


@pytest.mark.parametrize("cell", ["lstm", PlainCell])
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_init_weights_keeps_the_start(name, cell):
    model = stir(build(f"regulated_{name}", cell=cell))
    cell = [p.clone() for _, part in regulators(model) if hasattr(part, "cell") for p in part.cell.parameters()]
    classifier = model.get_classifier().weight.clone()
    stem = next(model.parameters()).clone()
    model.init_weights(zero_init_last=False)
    assert not torch.equal(next(model.parameters()), stem)
    assert classifier.shape == model.get_classifier().weight.shape
    assert at_its_start(model)
    now = [p for _, part in regulators(model) if hasattr(part, "cell") for p in part.cell.parameters()]
    assert all(map(torch.equal, cell, now))
    assert all(p.requires_grad and p.is_leaf for p in regulator_parameters(model))


def test_copies_and_pickles_keep_it(trained, original):
    for copied in (copy.deepcopy(trained[0]), pickle.loads(pickle.dumps(trained[0]))):
        assert type(copied) is type(trained[0])
        assert torch.equal(out(copied), out(trained[0]))
        load_checkpoint(copied, original)
        assert at_its_start(copied)
    assert not at_its_start(trained[0])
